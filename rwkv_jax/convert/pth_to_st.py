"""The command that converts an official .pth to a .st for web-rwkv."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.convert.st import to_st, write_safetensors
from rwkv_jax.errors import CommandParser, UserError
from rwkv_jax.files import flush_folder, reporting_os_errors, written_whole


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Convert an RWKV-7 .pth to the safetensors file that web-rwkv and Ai00 load.",
        epilog="example: %(prog)s out/rwkv-final.pth model.st",
    )
    parser.add_argument("source", metavar="IN.pth", type=Path, help="Any RWKV-7 (x070) model.")
    parser.add_argument(
        "target", metavar="OUT.st", type=Path, help="The file to write; must not exist."
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="Type of the tensors. float16 (default): the only one that web-rwkv and Ai00 load, "
        "rounded to nearest even; that of the .pth: the same values, exactly.",
    )
    args = parser.parse_args(argv)
    if args.target.exists():
        raise UserError(f"{args.target}: exists already; give a new name")
    there = weights.without_prefix(pth.read(args.source))
    _, model = weights.validate_model(there, source=str(args.source))
    tensors = to_st({name: tensor for name, tensor in model.items() if name in there})
    with reporting_os_errors(args.target, "write"), written_whole(args.target) as temporary:
        write_safetensors(temporary, tensors, args.dtype)
    flush_folder(args.target.parent)
    print(f"wrote {args.target}")
