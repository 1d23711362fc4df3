"""Compares our logits with those of flash-linear-attention for an exported model.

    pip install flash-linear-attention triton
    TRITON_INTERPRET=1 python -m benchmarks.fla_logits tests/data/oracles/tiny_v512_rand_fp32.pth

Without a GPU its kernels run in Triton's interpreter: minutes for the few tokens taken here.
"""

import tempfile
from pathlib import Path

import numpy as np

import rwkv_jax
from benchmarks import command, machine
from rwkv_jax.convert import pth_to_hf
from rwkv_jax.errors import run_command


def main() -> None:
    parser = command.record_parser(__doc__)
    parser.add_argument("model", type=Path, help="an official .pth of a tiny model")
    options = parser.parse_args()
    source = str(options.model)
    import torch
    from triton.runtime.autotuner import Autotuner

    if not torch.cuda.is_available():  # nothing to time kernels with: take the first form of each
        Autotuner._bench = lambda self, *args, config, **meta: [
            float(config is not self.configs[0])
        ]
    from fla.models import RWKV7ForCausalLM

    tokens = np.random.default_rng(0).integers(1, 500, (1, 24))
    with tempfile.TemporaryDirectory() as folder:
        pth_to_hf.main([source, f"{folder}/hf"])
        theirs = RWKV7ForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    ours, _ = rwkv_jax.load(source).forward(tokens)
    apart, largest = np.abs(logits - np.asarray(ours)).max(), np.abs(logits).max()
    print(f"largest difference {apart:.2g} of logits up to {largest:.3g}")
    if options.output:
        record = machine.record("fla_logits") | {
            "model": options.model.name,
            "fla": machine.installed("flash-linear-attention"),
            "largest_difference": float(apart),
            "largest_logit": float(largest),
        }
        machine.write(options.output, record)


if __name__ == "__main__":
    run_command(main)
