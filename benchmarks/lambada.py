"""LAMBADA of one file by `rwkv_jax.evaluate` and by a plain torch loop, text by text.

    python benchmarks/lambada.py lambada_test.jsonl --count 256 [--model MODEL.pth]

The loop (tests/torch_rwkv7.py) reads each text alone, from a token 0 on, in float32. Without
--model the file is made: of the 0.1b shape, official first weights with the tensors that begin at
zero drawn instead, so that every one of them matters. Prints both results, and the largest
difference of a last word's log-likelihood; writes results/lambada.json.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent / "tests")]
import machine  # noqa: E402
import torch_rwkv7  # noqa: E402

import rwkv_jax  # noqa: E402
from rwkv_jax import evaluate, weights  # noqa: E402
from rwkv_jax.config import SIZES, ModelConfig  # noqa: E402
from rwkv_jax.initialisation import init_params  # noqa: E402


def make_model(path: Path) -> None:
    rng = np.random.default_rng(0)

    def lively(leaf: np.ndarray) -> np.ndarray:
        if leaf.ndim == 3 and not leaf.any():
            return rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32)
        return leaf

    params = jax.tree.map(lively, init_params(ModelConfig(*SIZES["0.1b"]), 0))
    params["emb"]["weight"] = rng.normal(0, 1, params["emb"]["weight"].shape).astype(np.float32)
    weights.save_pth(path, params, np.float32)


def by_torch(path: Path, documents: list[evaluate.Document]) -> tuple[np.ndarray, np.ndarray]:
    """[texts] log-likelihood of the last word, and whether it is the first choice throughout."""
    params = torch.load(path, weights_only=True)
    nats, right = [], []
    with torch.no_grad():
        for number, (ids, ((begin, end),), _) in enumerate(documents):
            logits, _ = torch_rwkv7.forward(params, torch.tensor([[0, *ids[:-1]]]))
            asked, answer = logits[0, begin:end], torch.tensor(ids[begin:end])
            chosen = torch.log_softmax(asked, -1)[torch.arange(len(answer)), answer]
            nats.append(float(chosen.double().sum()))
            right.append(bool((asked.argmax(-1) == answer).all()))
            print(f"\rtorch: {number + 1} of {len(documents)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return np.array(nats), np.array(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder) / "model.pth"
        if args.model is None:
            make_model(path)
        documents = list(evaluate.lambada_documents(args.data))[: args.count]
        model = rwkv_jax.load(path)
        began = time.process_time()
        ours = evaluate.evaluate(model, "lambada", args.data, args.count)
        middle = time.process_time()
        nats, right = by_torch(path, documents)
        torch_seconds = time.process_time() - middle
        apart = 0.0
        for number, score in evaluate.score(model, [document.ids for document in documents]):
            ((begin, end),) = documents[number].spans
            own = -score.nats[begin:end].sum(dtype=np.float64)
            apart = max(apart, abs(own - nats[number]))
    theirs = {"accuracy": float(right.mean()), "perplexity": math.exp(-nats.mean())}
    result = {
        "machine": machine.describe(),
        "texts": len(documents),
        "rwkv_jax": {name: ours[name] for name in theirs} | {"cpu_s": middle - began},
        "torch loop": theirs | {"cpu_s": torch_seconds},
        "largest difference of a word's log-likelihood": apart,
    }
    print(json.dumps(result, indent=1))
    (HERE / "results" / "lambada.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
