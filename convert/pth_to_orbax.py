"""Turns an official .pth into an orbax checkpoint: python -m convert.pth_to_orbax IN.pth OUT_DIR"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from rwkv_jax.checkpoints.store import save_model
from rwkv_jax.checkpoints.weights import open_pth
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import CommandParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "python -m convert.pth_to_orbax",
        description="Turn an RWKV-7 .pth into an orbax checkpoint with float32 weights (exact) "
        "and no optimizer, which rwkv_jax.load, generate and train --load_model take.",
        epilog="example: python -m convert.pth_to_orbax rwkv-final.pth checkpoint",
    )
    parser.add_argument("source", metavar="IN.pth", type=Path, help="Any RWKV-7 (x070) model.")
    parser.add_argument(
        "target", metavar="OUT_DIR", type=Path, help="The folder to write; must not exist."
    )
    args = parser.parse_args(argv)
    prepare_jax()
    save_model(args.target, *open_pth(args.source))
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_command(main)
