"""`python -m rwkv_jax.evaluate`: measures a model on text, LAMBADA or the arithmetic task.

All three are one question to the model: how likely is each token of a document, given its own
beginning, and is it the model's first choice? A greedy continuation is an answer exactly if every
token of the answer is the first choice after those before it, so nothing has to be generated.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import rwkv_jax
from rwkv_jax.device.precision import PRECISIONS, device_precision, use_precision
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import CommandParser, UserError, path_argument, run_command
from rwkv_jax.files import check_writable, reporting_os_errors, written_whole
from rwkv_jax.inference.decoder import NOT_FINITE
from rwkv_jax.inference.scoring import group_by_length, score
from rwkv_jax.inference.tasks import TASKS, item_documents
from rwkv_jax.model.rwkv7 import RWKV7
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import open_binidx
from rwkv_jax.text.corpus import (
    SKIPPED,
    BadLine,
    Corpus,
    add_options,
    find,
    is_binidx,
    is_text,
    skipped_note,
    writing_skipped,
)
from rwkv_jax.text.tokenization import progress_bar

Array = jax.Array


# Tasks: texts → documents -------------------------------------------------------------------------


# Results ------------------------------------------------------------------------------------------


def evaluate(
    model: RWKV7,
    task: str,
    path: str | Path,
    limit: int = 0,
    text_key: str = "text",
    on_bad_line: str = "stop",
) -> dict[str, Any]:
    """The numbers of one task on one file, with a progress bar on standard error.

    text: `bits_per_byte` (unless the model has another tokenizer), and `perplexity` of a token.
    lambada: `accuracy`, and `perplexity` of a last word. arithmetic: `exact_match`, the part of all
    answers that greedy decoding gives.

    Args:
        task: a name in `TASKS`.
        path: text, all that `corpus.find` takes; for the task text also a binidx prefix, and any
            other file, as one text.
        limit: documents, from the first; 0: all.
        text_key, on_bad_line: as for `dataset.open_dataset`; `skipped` lines are counted, and
            listed in NAME.skipped.tsv in the current folder.

    Raises:
        UserError: the data cannot be used, or holds nothing.
    """
    skipped: list[BadLine] = []
    V = model.config.vocab_size
    is_world = not tokenizer.other_tokenizer(V)
    if task == "text" and is_binidx(path):
        data = open_binidx(path)
        documents, total = item_documents(data, V), len(data)
    else:
        tokenizer.check_vocabulary(V, str(path))
        corpus = _corpus(path, task, text_key, on_bad_line)
        documents, total = TASKS[task](corpus.documents(skipped)), 0
        if not limit and all(file.is_file() for file in corpus.files):
            total = sum(1 for _ in corpus.documents())
    total = limit or total
    counts = {"documents": 0, "answers": 0, "right": 0, "tokens": 0, "bytes": 0}
    nats = 0.0
    with progress_bar() as bar:
        progress = bar.add_task(task, total=total or None)
        for group in group_by_length(documents, limit):
            for number, answers in score(model, group):
                counts["answers"] += len(answers)
                counts["right"] += sum(answer.first for answer in answers)
                counts["tokens"] += sum(end - begin for begin, end in group[number].spans)
                counts["documents"] += 1
                counts["bytes"] += group[number].nbytes
                nats += sum(answer.nats for answer in answers)
                bar.advance(progress)
            if not math.isfinite(nats):
                raise UserError(NOT_FINITE)
    if not counts["bytes" if is_world else "tokens"]:
        first = [f": every line was skipped; {bad.where}: {bad.reason}" for bad in skipped[:1]]
        raise UserError(f"{path}: holds no text" + "".join(first))
    shown = {"task": task, "file": str(path), "documents": counts["documents"]}
    if skipped:
        listed = Path(corpus.stem + SKIPPED)
        with writing_skipped(listed) as rows:
            rows.writelines(bad.row() for bad in skipped)
        print(skipped_note(listed), file=sys.stderr)
        shown["skipped"] = len(skipped)
    if task == "text":
        shown |= {"tokens": counts["tokens"]}
        if is_world:  # the bytes of another tokenizer are not known
            shown |= {
                "bytes": counts["bytes"],
                "bits_per_byte": nats / math.log(2) / counts["bytes"],
            }
        return shown | {"perplexity": _exp(nats / counts["tokens"])}
    right = counts["right"] / counts["answers"]
    if task == "lambada":
        return shown | {"accuracy": right, "perplexity": _exp(nats / counts["answers"])}
    return shown | {"answers": counts["answers"], "exact_match": right}


def _corpus(path: str | Path, task: str, text_key: str, on_bad_line: str) -> Corpus:
    """The text; for the task text any file, whatever its name ends in, is one."""
    file = Path(path)
    if task == "text" and file.exists() and not file.is_dir() and not is_text(file):
        return Corpus(str(path), (file,))
    return find(path, text_key, on_bad_line)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Measure a model on text: a .jsonl, .txt or .parquet, a folder of them, or a "
        "pattern in quotes. text: bits per byte and perplexity, also of a binidx, and of any other "
        "file as one text; lambada: how often the last word of a text is the model's choice, and "
        "its perplexity; arithmetic: how often greedy decoding gives the answer exactly. Prints a "
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
        "--limit", type=int, default=0, help="only so many documents, from the first (0: all)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="of the computation (default: fp32 on a CPU, bf16 on a GPU, fp16 on those before "
        "Ampere)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, too")
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
