"""Bits per byte of a model on unseen chats of the demo task.

    python -m benchmarks.held_out out/rwkv-final.pth out/rwkv-init.pth [--output PATH]

The chats are `data.arithmetic`'s, from another seed than data/demo.jsonl. Beside the models stand
two that count: token frequencies (unigram) and pairs (bigram, interpolated with the unigram), both
over data/demo.jsonl. A model that has learned to add, or only to copy and to converse, has to be
well below them.
"""

import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import scipy.special

import rwkv_jax
from benchmarks import command, machine
from rwkv_jax.errors import run_command
from rwkv_jax.text import tokenizer
from rwkv_jax.text.arithmetic import write_corpus

DEMO = Path(__file__).parents[1] / "data" / "demo.jsonl"
LENGTH = 256  # chats are padded to a multiple of this; the padding is not counted


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]


def model_bits(path: Path, held_out: list[list[int]]) -> float:
    """Bits over all documents, each predicted from its own beginning (after token 0)."""
    model = rwkv_jax.load(path)
    nats = 0.0
    for ids in held_out:
        row = np.array(
            [0, *ids, *[0] * (-(len(ids) + 1) % LENGTH + 1)]
        )  # few lengths, few compilations
        logits = np.asarray(model.forward(row[None, :-1])[0][0, : len(ids)], np.float64)
        picked = np.take_along_axis(logits, row[1 : len(ids) + 1, None], axis=1)[:, 0]
        nats += float((scipy.special.logsumexp(logits, axis=1) - picked).sum())
    return nats / math.log(2)


def counting_bits(train: list[list[int]], held_out: list[list[int]]) -> dict[str, float]:
    """The same of the two counting models, whose unseen tokens share one count."""
    rows = [[0, *ids] for ids in train]
    single = Counter(token for row in rows for token in row[1:])
    pairs = Counter(pair for row in rows for pair in zip(row, row[1:], strict=False))
    before = Counter(token for row in rows for token in row[:-1])
    total = single.total()

    def unigram(token: int) -> float:
        return (single[token] + 1 / tokenizer.VOCAB_SIZE) / (total + 1)

    bits = {"unigram": 0.0, "bigram": 0.0}
    for ids in held_out:
        for last, token in zip([0, *ids], ids, strict=False):
            p = unigram(token)
            seen = before[last]
            both = (pairs[last, token] + 4 * p) / (seen + 4)
            bits["unigram"] -= math.log2(p)
            bits["bigram"] -= math.log2(both)
    return bits


def main() -> None:
    parser = command.record_parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, help=".pth files, or folders of runs")
    parser.add_argument("--count", type=int, default=100, help="chats (100)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "held_out.jsonl"
        write_corpus(path, arguments.count, seed=20_000)
        seen = documents(DEMO)
        texts = [text for text in documents(path) if text not in set(seen)]
    held_out = [tokenizer.encode(text) for text in texts]
    size = sum(len(text.encode()) for text in texts)
    bits = counting_bits([tokenizer.encode(text) for text in seen], held_out)
    bits |= {str(path): model_bits(path, held_out) for path in arguments.models}
    tokens = sum(map(len, held_out))
    print(f"{len(texts)} held-out chats, {size} bytes, {tokens} tokens")
    print(f"{'model':40} bits per byte   loss per token")
    for name, total in bits.items():
        print(f"{name:40} {total / size:13.3f} {total * math.log(2) / tokens:16.3f}")
    assert np.isfinite(list(bits.values())).all()
    if arguments.output:
        record = machine.record("held_out") | {
            "chats": len(texts),
            "bytes": size,
            "tokens": tokens,
            "bits_per_byte": {name: total / size for name, total in bits.items()},
        }
        machine.write(arguments.output, record)


if __name__ == "__main__":
    run_command(main)
