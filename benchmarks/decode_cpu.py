"""Compares greedy decoding on a CPU with the `rwkv` package.

    python -m benchmarks.decode_cpu [--turns 5] [--threads 1] [--output PATH]

fp32 and bf16, batch 1 and 16. Each contender is a process of its own with as many threads; they
take turns of a few tokens, so that other load affects both equally, and the CPU seconds
of a turn are counted beside its wall time. The package makes one sequence at a time: at batch 16 it
makes 16 of them in turn. In bf16 ours rounds the weights and computes in float32, as `--precision
bf16` does on a CPU.

First, in fp32, the 200 tokens that follow each of three prompts are compared: they have to be the
same.

Prints the rows of the table. The record has an entry a CPU; those of other CPUs stay in it.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks import command, machine
from rwkv_jax.errors import UserError, run_command

PROMPTS = [
    "User: 今天天气怎么样?\n\nAssistant:",
    "The Eiffel tower is in the city of",
    "从前有座山，",
]
SAME = 200  # tokens
TOKENS = {"fp32": 16, "bf16": 4}  # a turn


def write_model(path: Path) -> None:
    """A 0.1b model with random values in every tensor, which never ends a document."""
    import jax

    from rwkv_jax.checkpoints import weights
    from rwkv_jax.config import TrainConfig
    from rwkv_jax.model.rwkv7 import abstract_params

    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-2:][0].key.startswith("ln") and path[-1].key == "weight":
            return np.ones(leaf.shape, np.float32)
        wide = leaf.ndim == 3 or path[0].key in ("emb", "head")
        scale = leaf.shape[-1] ** -0.5 if wide else 0.3
        return np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)

    params = jax.tree.map_with_path(draw, abstract_params(TrainConfig(size="0.1b").model_config()))
    params["head"]["weight"][0] = 0
    weights.save_pth(path, params, np.float32)


def ours(path: str, precision: str, batch: int):
    import rwkv_jax
    from rwkv_jax.inference.decoder import Decoder
    from rwkv_jax.inference.generation import Reply, Text, generate
    from rwkv_jax.inference.sampling import GREEDY
    from rwkv_jax.text import tokenizer

    decoder = Decoder(*rwkv_jax.load_params(f"{path}.pth"), precision)
    if batch == 0:
        replies = [Reply() for _ in PROMPTS]
        texts = [Text().then(tokenizer.encode(prompt)) for prompt in PROMPTS]
        for _ in generate(decoder, texts, replies, SAME, GREEDY):
            pass
        return lambda: [reply.ids for reply in replies]
    prompt = decoder.prefill(tokenizer.encode(PROMPTS[0]))
    state = decoder.batch([prompt] * batch, seed=0)

    def turn() -> None:
        nonlocal state
        _, state = decoder.generate(state, TOKENS[precision], GREEDY)

    return turn


def theirs(path: str, precision: str, batch: int):
    import copy

    import torch
    from rwkv.model import RWKV
    from rwkv.utils import PIPELINE

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = RWKV(model=path, strategy=f"cpu {precision}")
    pipeline = PIPELINE(model, "rwkv_vocab_v20230424")

    def follow(logits, state, count: int):
        made = []
        for _ in range(count):
            made.append(int(logits.argmax()))
            logits, state = model.forward([made[-1]], state)
        return made, logits, state

    if batch == 0:
        made = [
            follow(*model.forward(pipeline.encode(prompt), None), SAME)[0] for prompt in PROMPTS
        ]
        return lambda: made
    first = model.forward(pipeline.encode(PROMPTS[0]), None)
    sequences = [copy.deepcopy(first) for _ in range(batch)]

    def turn() -> None:
        for number, (logits, state) in enumerate(sequences):
            _, *sequences[number] = follow(logits, state, TOKENS[precision])

    return turn


def contender(
    which: str, path: str, precision: str, batch: int, threads: int, pipe: Connection
) -> None:
    """In a process of its own: a turn when told to, answered with seconds and CPU seconds."""
    os.environ |= {
        "NPROC": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
        "RWKV_V7_ON": "1",
        "RWKV_JIT_ON": "1",
    }
    turn = {"ours": ours, "theirs": theirs}[which](path, precision, batch)
    pipe.send(None)
    while pipe.recv():
        began, began_cpu = time.perf_counter(), time.process_time()
        result = turn()
        pipe.send((time.perf_counter() - began, time.process_time() - began_cpu, result))


def race(path: str, precision: str, batch: int, threads: int, turns: int) -> dict[str, list]:
    spawn = multiprocessing.get_context("spawn")
    pipes, answers = {}, {}
    for which in ("ours", "theirs"):
        pipes[which], end = spawn.Pipe()
        arguments = (which, path, precision, batch, threads, end)
        spawn.Process(target=contender, args=arguments, daemon=True).start()
        pipes[which].recv()  # one at a time, also when getting ready
        answers[which] = []
    for turn in range(-1, turns):  # the first compiles
        for which, pipe in pipes.items():
            pipe.send(True)
            answer = pipe.recv()
            if turn >= 0:
                answers[which].append(answer)
    for pipe in pipes.values():
        pipe.send(False)
    return answers


def main() -> None:
    parser = command.record_parser(__doc__, "write the record (JSON) here, row by row")
    parser.add_argument("--turns", type=int, default=5, help="timed ones of each (5)")
    parser.add_argument("--threads", type=int, default=1, help="of each contender (1)")
    options = parser.parse_args()
    others = {}
    if options.output and options.output.exists():
        others = json.loads(options.output.read_text())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model")
        write_model(Path(f"{path}.pth"))
        same = race(path, "fp32", 0, options.threads, 1)
        identical = same["ours"][0][2] == same["theirs"][0][2]
        print(f"greedy, {len(PROMPTS)} x {SAME} tokens, fp32: {identical=}", flush=True)
        print("| | batch | ours, ms | rwkv package, ms | rwkv / ours | the same in wall time |")
        print("|---|---|---|---|---|---|")
        for precision in ("fp32", "bf16"):
            for batch in (1, 16):
                few = min(options.turns, 2) if precision == "bf16" and batch > 1 else options.turns
                answers = race(path, precision, batch, options.threads, few)
                cpu = {
                    which: statistics.median(answer[1] for answer in some) / TOKENS[precision]
                    for which, some in answers.items()
                }
                wall = {
                    which: statistics.median(answer[0] for answer in some) / TOKENS[precision]
                    for which, some in answers.items()
                }
                ratio, wall_ratio = (x["theirs"] / x["ours"] for x in (cpu, wall))
                rows.append(
                    {
                        "precision": precision,
                        "batch": batch,
                        "cpu_seconds_a_step": cpu,
                        "seconds_a_step": wall,
                        "theirs / ours, CPU seconds": ratio,
                        "theirs / ours, wall": wall_ratio,
                        "turns": few,
                    }
                )
                print(
                    f"| {precision} | {batch} | {cpu['ours'] * 1e3:.1f} "
                    f"| {cpu['theirs'] * 1e3:.1f} | {ratio:.2f} | {wall_ratio:.2f} |",
                    flush=True,
                )
                result = machine.record("decode_cpu") | {
                    "what": "0.1b, greedy, CPU seconds a step of the whole batch, medians of turns",
                    "threads": options.threads,
                    "tokens_a_turn": TOKENS,
                    "greedy_identical": {
                        "prompts": len(PROMPTS),
                        "tokens": SAME,
                        "same": identical,
                    },
                    "rows": rows,
                }
                if options.output:
                    machine.write(options.output, others | {machine.cpu_name(): result})
    if not identical:
        raise UserError("the greedy continuations differ")


if __name__ == "__main__":
    run_command(main)
