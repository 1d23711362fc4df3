"""The Pallas kernels against the float64 recurrence: on a GPU, else interpreted as plain JAX."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels.wkv7 import api, numerics, wkv7
from pallas_kernels.wkv7.triton import call
from pallas_kernels.wkv7.triton.tuning import tuning_for
from tests.support.wkv7_suite import (
    NAMES,
    Case,
    WKV7Suite,
    cast,
    outputs_and_gradients,
    relative_error,
    truth,
)

interpreted = functools.partial(call.wkv7_pallas_triton, interpret=jax.default_backend() != "gpu")


@pytest.fixture
def interpret(monkeypatch):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_triton", (__name__, "interpreted"))


@pytest.mark.slow
@pytest.mark.usefixtures("interpret")
class TestPallasTriton(WKV7Suite):
    implementation = "pallas_triton"


@pytest.mark.slow
@pytest.mark.parametrize(
    "tuning, reset",
    sorted(
        {
            (dataclasses.replace(tuning_for((major, 0), size, reset, jnp.bfloat16), warps=2), reset)
            for major, size, reset in itertools.product((8, 9, 12), (64, 128), (False, True))
        },
        key=str,
    ),
)
def test_every_tuning_is_right(interpret, monkeypatch, tuning, reset):
    """Whatever card and head size it was chosen for."""
    starts = (0, 16, 32, 64, 128), (5, 63, 64, 65, 149)
    case = Case("tuning", time=150, size=32, reset=starts if reset else None)
    monkeypatch.setattr(call, "tuning_for", lambda *_: tuning)
    op = functools.partial(wkv7, implementation="pallas_triton")
    results = outputs_and_gradients(op, *cast(case, "bfloat16"))
    for name, x, true in zip(NAMES, results, truth(case), strict=True):
        assert relative_error(x, true) < 1e-2, name


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "pallas_triton"])
def test_sharded_over_batch_and_heads(monkeypatch, implementation):
    """On simulated devices, each of which has one head of one sequence: values and gradients."""
    always = functools.partial(call.wkv7_pallas_triton, interpret=True)
    monkeypatch.setitem(globals(), "interpreted", always)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_triton", (__name__, "interpreted"))
    devices = np.array(jax.devices("cpu")[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "model"))
    tokens, states = PartitionSpec("data", None, "model"), PartitionSpec("data", "model")
    op = functools.partial(wkv7, implementation=implementation, return_state=True)

    def sharded(*inputs, reset, return_state):
        return jax.shard_map(
            lambda reset, *inputs: op(*inputs, reset=reset),
            mesh=mesh,
            in_specs=(PartitionSpec("data"), *[tokens] * 6, states),
            out_specs=(tokens, states),
            check_vma=False,  # Pallas' interpreter does not follow what varies over which axis
        )(reset, *inputs)

    with jax.default_device(devices[0, 0]):
        inputs = cast(Case("sharded", time=40, size=16, reset=((0, 20), (16, 17))), "float32")
        whole = outputs_and_gradients(op, *inputs)
        for name, x, y in zip(NAMES, outputs_and_gradients(sharded, *inputs), whole, strict=True):
            assert len(x.sharding.device_set) == 4, name
            assert relative_error(x, np.asarray(y, np.float64)) < 1e-6, name


@pytest.mark.parametrize("capability", [None, (7, 5)])
def test_refuses_what_it_cannot_serve(monkeypatch, capability):
    for module in (api, call):
        monkeypatch.setattr(module, "current_compute_capability", lambda: capability)
    inputs, _, _ = cast(Case("small", time=3, size=16), "bfloat16")
    with pytest.raises(NotImplementedError, match="compute capability 8.0"):
        wkv7(*inputs, implementation="pallas_triton")
    assert api.choose(inputs[3])[0] == "xla"
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        wkv7(*(x.astype(jnp.float64) for x in inputs), implementation="pallas_triton")
    huge = [jax.ShapeDtypeStruct((32, 4096, 64, 64), jnp.bfloat16)] * 6
    op = functools.partial(wkv7, implementation="pallas_triton")
    with pytest.raises(NotImplementedError, match="32 bits"):
        jax.eval_shape(op, *huge)


@pytest.mark.slow
def test_float32_decay_logits_beside_bfloat16(interpret):
    inputs, _, _ = cast(Case("small", time=20, size=16), "bfloat16")
    wide = [x.astype(jnp.float32) if i == 1 else x for i, x in enumerate(inputs)]

    def both(w):
        return wkv7(inputs[0], w, *inputs[2:], implementation="pallas_triton")

    y, vjp = jax.vjp(both, wide[1])
    assert y.dtype == jnp.bfloat16 and vjp(y)[0].dtype == jnp.float32


def test_inverse_stays_accurate_where_the_product_form_does_not():
    """All keys aligned, in-context learning rate 1, no decay: a·b = −1 for every pair."""
    length = 16
    m = jnp.asarray(-np.tril(np.ones((length, length)), -1), jnp.float32)
    exact = np.linalg.inv(np.eye(length) - np.asarray(m))

    def dot(x, y):
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)

    bfloat16 = jnp.bfloat16
    ops = numerics.TileOps(bfloat16, dot, jnp.exp2, jnp.reciprocal)

    # Not powers of two, as real products of keys are not.
    m, exact = 0.997 * m, np.linalg.inv(np.eye(length) - 0.997 * np.asarray(m))
    ours = numerics.unit_triangular_inverse(m, ops)
    power, product = m, m + jnp.eye(length)
    for _ in range(3):  # (I + M)(I + M²)(I + M⁴)(I + M⁸)
        power = dot(power.astype(bfloat16), power.astype(bfloat16))
        product = dot(product.astype(bfloat16), (jnp.eye(length) + power).astype(bfloat16))
    assert relative_error(ours, exact) < 5e-3
    assert relative_error(product, exact) > 0.1


# As with a later jax that no longer has the module, on an H100.
WITHOUT_TRITON = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import importlib, json, pkgutil
import jax.numpy as jnp
import pallas_kernels, rwkv_jax
from pallas_kernels import gpu_targets
gpu_targets.current_compute_capability = lambda: (9, 0)
for package in (pallas_kernels, rwkv_jax):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name == "lm_eval", error  # an extra
from pallas_kernels.wkv7 import wkv7
from rwkv_jax import doctor
from rwkv_jax.diagnosis import facts, self_test
x = [jnp.full((1, 20, 1, 16), 0.1, jnp.bfloat16)] * 6
result = {"like xla": bool((wkv7(*x) == wkv7(*x, implementation="xla")).all())}
try:
    wkv7(*x, implementation="pallas_triton")
except NotImplementedError as error:
    result["error"] = str(error)
trial = facts.Trial(self_test.jax_facts(), {}, "", "")
result["doctor"] = dict(doctor.report(facts.gather_facts(trial)))["WKV, bfloat16"]
print(json.dumps(result))
"""


@pytest.mark.slow
def test_a_jax_without_the_triton_backend_uses_the_xla_form(tmp_path):
    """Everything imports; naming the kernels is one line of error, which doctor shows, too."""
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", WITHOUT_TRITON],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr
    reason = (
        "pallas_triton needs jax.experimental.pallas.triton, which jax "
        f"{jax.__version__} does not have; jax 0.12 has it"
    )
    assert json.loads(run.stdout) == {
        "like xla": True,
        "error": reason,
        "doctor": f"xla: {reason}",
    }
