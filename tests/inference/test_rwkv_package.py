"""A model that our trainer wrote, run by the program that people run such models with.

The training is the real command, long enough that every tensor has left its initial value; the
reader is the `rwkv` package on the CPU in fp32, in a process of its own (it reads its environment
at import and changes torch's settings).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rwkv_jax

pytestmark = pytest.mark.torch

PROMPT = b"User: 123+456=?\n\nAssistant:"  # bytes as tokens: id = byte + 1
NEW_TOKENS = 60

THEIRS = """
import json, sys
import numpy as np
from rwkv.model import RWKV
path, prompt, count, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = RWKV(model=path, strategy="cpu fp32")
logits, state = model.forward(prompt, None, full_output=True)
rows = list(logits.numpy())
for _ in range(count):
    logits, state = model.forward([int(rows[-1].argmax())], state)
    rows.append(logits.numpy())
np.savez(out, logits=np.stack(rows), wkv=np.stack([s.numpy() for s in state[1::3]]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """rwkv-final.pth (bf16) of thirty steps of the command on the published demo text."""
    folder = tmp_path_factory.mktemp("trained")
    options = {
        "data_file": Path(__file__).parents[1] / "data" / "demo_official.jsonl",
        "proj_dir": folder,
        "n_layer": 2,
        "n_embd": 64,
        "ctx_len": 32,
        "micro_bsz": 4,
        "my_exit_tokens": 30 * 4 * 32,
        "lr_init": 2e-3,
        "accelerator": "cpu",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_jax.train", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "rwkv-final.pth"


@pytest.mark.slow
def test_the_rwkv_package_continues_as_we_do(trained, tmp_path):
    prompt = [byte + 1 for byte in PROMPT]
    subprocess.run(
        [
            *(sys.executable, "-c", THEIRS, str(trained.with_suffix(""))),
            *(json.dumps(prompt), str(NEW_TOKENS), str(tmp_path / "theirs.npz")),
        ],
        env={**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0"},
        check=True,
        capture_output=True,
    )
    theirs = np.load(tmp_path / "theirs.npz")

    model = rwkv_jax.load(trained)
    logits, state = model.forward(np.array([prompt], np.int32))
    rows = list(np.asarray(logits[0]))
    for _ in range(NEW_TOKENS):
        logits, state = model.forward(np.array([[rows[-1].argmax()]], np.int32), state)
        rows.append(np.asarray(logits[0, 0]))

    ours = np.stack(rows)
    np.testing.assert_allclose(ours, theirs["logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(ours.argmax(-1), theirs["logits"].argmax(-1))
    np.testing.assert_allclose(state.wkv[:, 0], theirs["wkv"], rtol=0, atol=1e-4)
    assert np.abs(ours).max() > 1  # the logits are of a size that 1e-4 means something for
