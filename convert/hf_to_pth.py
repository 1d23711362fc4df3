"""Turns a Hugging Face folder into an official .pth: python -m convert.hf_to_pth IN_DIR OUT.pth"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from convert.hf import read_hf
from rwkv_jax.checkpoints import pth
from rwkv_jax.errors import CommandParser, UserError, run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "python -m convert.hf_to_pth",
        description="Turn a folder in flash-linear-attention's layout (config.json, "
        "model.safetensors or pytorch_model.bin, or their shards) into a .pth in the official "
        "format, of the same dtype.",
        epilog="example: python -m convert.hf_to_pth hf-model model.pth",
    )
    parser.add_argument(
        "source", metavar="IN_DIR", type=Path, help="The folder of a Hugging Face model."
    )
    parser.add_argument(
        "target", metavar="OUT.pth", type=Path, help="The file to write; must not exist."
    )
    args = parser.parse_args(argv)
    if args.target.exists():
        raise UserError(f"{args.target}: exists already; give a new name")
    pth.write(args.target, read_hf(args.source))
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_command(main)
