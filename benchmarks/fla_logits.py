"""Logits of flash-linear-attention's own RWKV-7, loaded from our export, beside ours.

    pip install flash-linear-attention triton
    TRITON_INTERPRET=1 python benchmarks/fla_logits.py tests/data/oracles/tiny_v512_rand_fp32.pth

Without a GPU its kernels run in Triton's interpreter: minutes for the few tokens taken here.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
import rwkv_jax  # noqa: E402
from rwkv_jax.convert import pth_to_hf  # noqa: E402


def main() -> None:
    from triton.runtime.autotuner import Autotuner

    if not torch.cuda.is_available():  # nothing to time kernels with: take the first form of each
        Autotuner._bench = lambda self, *args, config, **meta: [
            float(config is not self.configs[0])
        ]
    from fla.models import RWKV7ForCausalLM

    source = sys.argv[1]
    tokens = np.random.default_rng(0).integers(1, 500, (1, 24))
    with tempfile.TemporaryDirectory() as folder:
        pth_to_hf.main([source, f"{folder}/hf"])
        theirs = RWKV7ForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs.eval()(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    ours, _ = rwkv_jax.load(source).forward(tokens)
    print(
        f"largest difference {np.abs(logits - np.asarray(ours)).max():.2g} of logits up to "
        f"{np.abs(logits).max():.3g}"
    )


if __name__ == "__main__":
    main()
