"""The command that converts a Hugging Face folder to an official .pth."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_jax.checkpoints import pth
from rwkv_jax.convert.hf import read_hf
from rwkv_jax.errors import CommandParser, UserError


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Convert a folder in flash-linear-attention's layout (config.json, "
        "model.safetensors or pytorch_model.bin, or their shards) to a .pth in the official "
        "format, of the same dtype.",
        epilog="example: %(prog)s hf-model model.pth",
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
