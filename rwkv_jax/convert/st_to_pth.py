"""The command that converts a .st of web-rwkv to an official .pth."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.convert.st import read_st
from rwkv_jax.errors import CommandParser, UserError


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Convert a safetensors file of web-rwkv or Ai00 with an RWKV-7 model to a .pth "
        "in the official format, of the same dtype.",
        epilog="example: %(prog)s model.st model.pth",
    )
    parser.add_argument(
        "source",
        metavar="IN.st",
        type=Path,
        help="A file from pth_to_st or from web-rwkv's own converter.",
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
