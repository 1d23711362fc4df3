"""The command that converts a checkpoint to an official .pth."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.checkpoints.store import open_newest
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import CommandParser, UserError


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Convert a checkpoint to a .pth in the official format, which the rwkv package "
        "and RWKV Runner load.",
        epilog="example: %(prog)s out model.pth, or out/checkpoints/2000 instead of out for a "
        "specific step",
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_DIR",
        type=Path,
        help="A run's output folder (its newest checkpoint is used) or a checkpoint.",
    )
    parser.add_argument(
        "target", metavar="OUT.pth", type=Path, help="The file to write; must not exist."
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="Type of the tensors. bfloat16 (default): rounded to nearest even, half the size, "
        "as the official trainer writes; float32: the master weights, exactly.",
    )
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        raise UserError(f"{args.source}: is not a folder; give a run's output folder")
    if args.target.exists():
        raise UserError(f"{args.target}: exists already; give a new name")
    prepare_jax()
    source = str(args.source)
    open_newest(
        args.source,
        lambda _, tensors: pth.write(
            args.target, weights.with_finite_check(tensors, source), args.dtype
        ),
    )
    print(f"wrote {args.target}")
