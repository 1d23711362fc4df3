"""The command that converts an official .pth to a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_jax.checkpoints import pth
from rwkv_jax.convert.hf import write_hf
from rwkv_jax.errors import CommandParser


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Convert an RWKV-7 .pth to the folder that flash-linear-attention's "
        "RWKV7ForCausalLM.from_pretrained loads: config.json, model.safetensors (of the same "
        "dtype) and, for a vocabulary of 65536, the tokenizer that AutoTokenizer loads.",
        epilog="example: %(prog)s out/rwkv-final.pth hf-model",
    )
    parser.add_argument("source", metavar="IN.pth", type=Path, help="Any RWKV-7 (x070) model.")
    parser.add_argument(
        "target", metavar="OUT_DIR", type=Path, help="The folder to write; must not exist."
    )
    args = parser.parse_args(argv)
    write_hf(args.target, pth.read(args.source), str(args.source))
    print(f"wrote {args.target}")
