"""The command that converts an official .pth to an orbax checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_jax.checkpoints.store import save_model
from rwkv_jax.checkpoints.weights import open_pth
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import CommandParser


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Convert an RWKV-7 .pth to an orbax checkpoint with float32 weights (exact) "
        "and no optimizer. rwkv_jax.load, generate and train --load_model accept it.",
        epilog="example: %(prog)s rwkv-final.pth checkpoint",
    )
    parser.add_argument("source", metavar="IN.pth", type=Path, help="Any RWKV-7 (x070) model.")
    parser.add_argument(
        "target", metavar="OUT_DIR", type=Path, help="The folder to write; must not exist."
    )
    args = parser.parse_args(argv)
    prepare_jax()
    save_model(args.target, *open_pth(args.source))
    print(f"wrote {args.target}")
