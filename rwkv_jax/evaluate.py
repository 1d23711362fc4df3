"""`python -m rwkv_jax.evaluate`: measures a model on text, LAMBADA or the arithmetic task."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import rwkv_jax
from rwkv_jax.device.precision import PRECISIONS, device_precision, use_precision
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import CommandParser, UserError, path_argument, run_command
from rwkv_jax.files import check_writable, reporting_os_errors, written_whole
from rwkv_jax.inference.evaluation import evaluate
from rwkv_jax.inference.tasks import TASKS
from rwkv_jax.text.corpus import add_options


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Evaluate a model on text: a .jsonl, .txt or .parquet, a folder of them, or a "
        "quoted pattern. text: bits per byte and perplexity, also of a binidx; any other file is "
        "read as one text. lambada: how often the last word of a text is the model's choice, and "
        "its perplexity. arithmetic: how often greedy decoding gives the exact answer. Prints one "
        "line of JSON.",
        epilog="example: %(prog)s --load_model out --data_file held_out.jsonl",
    )
    parser.add_argument(
        "--load_model",
        required=True,
        type=path_argument,
        metavar="X",
        help="a .pth, the output folder of a run, or a checkpoint",
    )
    parser.add_argument(
        "--data_file", required=True, type=path_argument, metavar="FILE", help="see above"
    )
    add_options(parser)
    parser.add_argument("--task", choices=TASKS, default="text", help="what to measure (text)")
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        help="number of documents to evaluate, from the first (0: all)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="precision of the computation (default: fp32 on a CPU, bf16 on a GPU, fp16 on one "
        "older than Ampere)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the result to this file"
    )
    args = parser.parse_args(argv)
    if args.limit < 0:
        raise UserError(f"--limit {args.limit}: give 0 (all) or more")
    if args.output:
        check_writable(args.output)
    prepare_jax()
    precision = args.precision or device_precision()
    use_precision(precision)
    model = rwkv_jax.load(args.load_model, PRECISIONS[precision])
    result = {"model": args.load_model, "precision": precision}
    data = args.data_file, args.limit, args.text_key, args.on_bad_line
    result |= evaluate(model, args.task, *data)
    text = json.dumps(result, ensure_ascii=False)
    print(text)
    if args.output:
        with reporting_os_errors(args.output, "write"), written_whole(args.output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
