"""Compares `rwkv_jax.evaluate` with a plain torch loop on LAMBADA.

    python -m benchmarks.lambada lambada_test.jsonl --count 256 [--model MODEL.pth] [--output PATH]

The loop (tests/support/torch_rwkv7.py) reads each text alone, from a token 0 on, in float32.
Without --model the file is made: of the 0.1b shape, official first weights with the tensors that
begin at zero drawn instead, so that every one of them matters; then the head is fitted, by ridge
regression, to give the last words of every other text, so that some answers are right and some
are wrong.

Both use one thread, and their CPU seconds are counted from the loaded model on, what jax compiles
included. Prints both results, and the largest difference of a last word's log-likelihood.
"""

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import rwkv_jax
from benchmarks import command, machine
from rwkv_jax.checkpoints import weights
from rwkv_jax.config import SIZES, ModelConfig
from rwkv_jax.device.precision import use_precision
from rwkv_jax.errors import run_command
from rwkv_jax.inference import evaluation, scoring, tasks
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.model.rwkv7 import RWKV7, bind
from rwkv_jax.text.corpus import find

RIDGE, SCALE = 1.0, 20.0  # of the fit; and the logit that it aims at


def make_model(path: Path, fitted: list[scoring.Document]) -> None:
    rng = np.random.default_rng(0)

    def lively(leaf: np.ndarray) -> np.ndarray:
        if leaf.ndim == 3 and not leaf.any():
            return rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32)
        return leaf

    params = jax.tree.map(lively, init_params(ModelConfig(*SIZES["0.1b"]), 0))
    params["emb"]["weight"] = rng.normal(0, 1, params["emb"]["weight"].shape).astype(np.float32)
    wanted = np.concatenate([document.ids[slice(*document.spans[0])] for document in fitted])
    x = hidden(bind(ModelConfig(*SIZES["0.1b"]), params), fitted)  # [n, C]
    gram = x.T @ x + RIDGE * np.eye(x.shape[1])
    tokens, place = np.unique(wanted, return_inverse=True)
    aims = SCALE * (place[:, None] == np.arange(len(tokens)))  # [n, tokens]
    params["head"]["weight"][tokens] += np.linalg.solve(gram, x.T @ aims).T.astype(np.float32)
    weights.save_pth(path, params, np.float32)


def hidden(model: RWKV7, documents: list[scoring.Document]) -> np.ndarray:
    """[n, C] float64: the head's input where the tokens of the last words are asked for."""
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params, rows: nnx.merge(graphdef, params).hidden(rows)[0])
    longest = max(len(document.ids) for document in documents)
    found = []
    for start in range(0, len(documents), 16):
        group = documents[start : start + 16]
        rows = np.zeros((16, longest), np.int32)
        for row, document in zip(rows, group, strict=False):
            row[1 : len(document.ids)] = document.ids[:-1]  # after a token 0
        x = np.asarray(run(params, rows), np.float64)
        found += [x[row, slice(*document.spans[0])] for row, document in enumerate(group)]
    return np.concatenate(found)


def by_torch(path: Path, documents: list[scoring.Document]) -> tuple[np.ndarray, np.ndarray]:
    """[texts] log-likelihood of the last word, and whether it is the first choice throughout."""
    import torch

    from tests.support import torch_rwkv7

    torch.set_num_threads(1)
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
    parser = command.record_parser(__doc__)
    parser.add_argument("data", type=Path, help="texts, a line of JSON each")
    parser.add_argument("--count", type=int, default=256, help="of the texts (256)")
    parser.add_argument("--model", type=Path, metavar="PATH", help=".pth; else one is made")
    args = parser.parse_args()
    os.environ["NPROC"] = "1"  # threads; read when jax starts its backend
    use_precision("fp32")
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder) / "model.pth"
        documents = list(tasks.lambada_documents(find(args.data).documents()))[: args.count]
        if args.model is None:
            make_model(path, documents[::2])
        model = rwkv_jax.load(path)
        began = time.process_time()
        ours = evaluation.evaluate(model, "lambada", args.data, args.count)
        middle = time.process_time()
        nats, right = by_torch(path, documents)
        torch_seconds = time.process_time() - middle
        apart = 0.0
        for number, (answer,) in scoring.score(model, documents):
            apart = max(apart, abs(-answer.nats - nats[number]))
    theirs = {"accuracy": float(right.mean()), "perplexity": math.exp(-nats.mean())}
    result = machine.record("lambada") | {
        "texts": len(documents),
        "tokens": sum(len(document.ids) for document in documents),
        "rwkv_jax": {name: ours[name] for name in theirs} | {"cpu_s": middle - began},
        "torch loop": theirs | {"cpu_s": torch_seconds},
        "largest difference of a word's log-likelihood": apart,
    }
    print(json.dumps(result, indent=1))
    if args.output:
        machine.write(args.output, result)


if __name__ == "__main__":
    run_command(main)
