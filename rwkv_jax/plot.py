"""`python -m rwkv_jax.plot RUN…`: loss curves as a self-contained HTML page and a PNG.

The page works in any browser; the PNG needs matplotlib (the extra `plot`).
"""

import math
import sys
from pathlib import Path

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from rwkv_jax.errors import CommandParser, UserError, run_command
from rwkv_jax.files import check_writable
from rwkv_jax.tracking.charts import output_paths, write_plots
from rwkv_jax.tracking.curves import (
    REFERENCE_CTX_LEN,
    REFERENCE_NAME,
    REFERENCE_WITHIN,
    read_run,
    reference,
    verdict,
)


def main() -> None:
    options = _parser().parse_args()
    if not options.runs and not options.reference:
        raise UserError("give a run: its folder or its train_log.txt (see --help)")
    if options.ctx_len < 1:
        raise UserError(f"--ctx_len {options.ctx_len}: give 1 or more")
    if not options.output.name:
        raise UserError(f"--output {options.output}: is a folder; add a file name")
    for path in output_paths(options.output):
        check_writable(path)
    curves = [read_run(run, options.ctx_len) for run in options.runs]
    curves += [reference()] if options.reference else []
    for curve in curves:
        last = float(curve.trend[-1])
        print(
            f"{curve.name}: {curve.tokens[-1]:,.0f} tokens, loss {last:.4f}, "
            f"perplexity {math.exp(last):.2f}"
        )
    for run in options.runs if options.reference else ():
        try:
            print(verdict(run))
        except UserError as error:  # a run without such a miniepoch yet is still drawn
            print(f"not compared: {error}")
    written = write_plots(curves, options.output)
    print("wrote " + " and ".join(map(str, written)))
    if len(written) == 1:
        print("for the .png as well: pip install matplotlib (the extra plot)")


def _parser() -> CommandParser:
    parser = CommandParser(
        description="Plot the loss of one or more runs: OUTPUT.html, for any browser, and "
        "OUTPUT.png if matplotlib is installed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="A run's folder (its step_log.tsv is read, else its train_log.txt), or such a file, "
        "for example of the official trainer.",
    )
    parser.add_argument(
        "--reference",
        action="store_true",
        help=f"Also draw the official curve, {REFERENCE_NAME}, ctx_len 512, batch 16; print the "
        f"difference of each miniepoch, and whether all are within {REFERENCE_WITHIN}.",
    )
    parser.add_argument(
        "--ctx_len",
        metavar="TOKENS",
        type=int,
        default=REFERENCE_CTX_LEN,
        help="Length of a sample in runs with only a train_log.txt, to convert miniepochs to "
        "tokens (default 512).",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        default=Path("loss"),
        help="Where to write PATH.html and PATH.png (default loss).",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
