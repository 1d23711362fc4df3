"""The command that prints the options to train on a binidx file, the magic prime among them."""

from collections.abc import Sequence
from pathlib import Path

from rwkv_jax.errors import CommandParser
from rwkv_jax.text.binidx import BinIdx, open_binidx
from rwkv_jax.text.dataset import Dataset
from rwkv_jax.text.sampler import choose_magic_prime
from rwkv_jax.text.tokenizer import VOCAB_SIZE


def report(name: str, data: BinIdx, ctx_len: int) -> str:
    """Items and tokens of `data`, and the options to train on it.

    Raises:
        UserError: `data` is too short for `ctx_len`, or has an id outside the vocabulary.
    """
    tokens = len(data.tokens)
    magic_prime = choose_magic_prime(name, tokens, ctx_len)
    Dataset(name, data.tokens, ctx_len, magic_prime, VOCAB_SIZE).check_all_ids()
    return (
        f"{name}: {len(data)} items, {tokens} tokens\n"
        f"--my_exit_tokens {tokens} --magic_prime {magic_prime} --ctx_len {ctx_len}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Print the options to train on a binidx file at a context length. The magic "
        "prime is the largest prime that leaves 2 when divided by 3 and is smaller than the number "
        "of samples (tokens / CTX_LEN); it determines the order of the samples in training. It "
        "depends on CTX_LEN. The trainer computes it if --magic_prime is not given.",
        epilog="example: %(prog)s demo 4096",
    )
    parser.add_argument(
        "prefix", metavar="PREFIX", type=Path, help="The token files PREFIX.bin and PREFIX.idx."
    )
    parser.add_argument(
        "ctx_len", metavar="CTX_LEN", type=int, help="Length of a sample in tokens."
    )
    args = parser.parse_args(argv)
    print(report(str(args.prefix), open_binidx(args.prefix), args.ctx_len))
