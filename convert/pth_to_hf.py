"""Turns an official .pth into a Hugging Face folder: python -m convert.pth_to_hf IN.pth OUT_DIR"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from convert.hf import write_hf
from rwkv_jax.checkpoints import pth
from rwkv_jax.errors import CommandParser, run_command


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "python -m convert.pth_to_hf",
        description="Turn an RWKV-7 .pth into the folder that flash-linear-attention's "
        "RWKV7ForCausalLM.from_pretrained loads: config.json, model.safetensors (of the same "
        "dtype) and, for a vocabulary of 65536, the tokenizer that AutoTokenizer loads.",
        epilog="example: python -m convert.pth_to_hf out/rwkv-final.pth hf-model",
    )
    parser.add_argument("source", metavar="IN.pth", type=Path, help="Any RWKV-7 (x070) model.")
    parser.add_argument(
        "target", metavar="OUT_DIR", type=Path, help="The folder to write; must not exist."
    )
    args = parser.parse_args(argv)
    write_hf(args.target, pth.read(args.source), str(args.source))
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_command(main)
