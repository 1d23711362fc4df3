"""Turns a .st of web-rwkv into an official .pth: python -m convert.st_to_pth IN.st OUT.pth"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from convert.st import read_st
from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.errors import CommandParser, UserError, run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "python -m convert.st_to_pth",
        description="Turn the safetensors file of an RWKV-7 model that web-rwkv and Ai00 load into "
        "a .pth in the official format, of the same dtype.",
        epilog="example: python -m convert.st_to_pth model.st model.pth",
    )
    parser.add_argument(
        "source", metavar="IN.st", type=Path, help="Of pth_to_st, or of web-rwkv's own converter."
    )
    parser.add_argument(
        "target", metavar="OUT.pth", type=Path, help="The file to write; must not exist."
    )
    args = parser.parse_args(argv)
    if args.target.exists():
        raise UserError(f"{args.target}: exists already; give a new name")
    there = weights.without_prefix(read_st(args.source))
    _, model = weights.validate_model(there, source=str(args.source))
    pth.write(args.target, {name: tensor for name, tensor in model.items() if name in there})
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_command(main)
