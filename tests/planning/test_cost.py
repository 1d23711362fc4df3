"""What is counted of a step: against the shapes of its products, and programs of known traffic."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from rwkv_jax.config import ModelConfig
from rwkv_jax.model import rwkv7
from rwkv_jax.model.loss import head_loss
from rwkv_jax.planning import cost
from rwkv_jax.training import utilization


def test_model_flops_are_those_of_the_passes(monkeypatch):
    """All products of the passes, with a WKV of none, but for v_first's, made ahead of the scan."""
    config, batch, length = ModelConfig(n_layer=3, n_embd=128, vocab_size=512), 2, 32
    monkeypatch.setattr(
        rwkv7, "wkv7", lambda r, w, k, v, a, b, state, **_: (r + w + k + v + a + b, state)
    )

    def loss(params, tokens):
        bound = rwkv7.bind(config, params)
        hidden, _ = bound.hidden(tokens[:, :-1], remat=0)
        return head_loss(hidden, bound.head.weight[...], tokens[:, 1:], 0, scale=jnp.float32(1))

    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    passes = jax.make_jaxpr(jax.value_and_grad(loss))(rwkv7.abstract_params(config), tokens)
    counted = cost.flops(passes.jaxpr) / (batch * length)
    recurrence = 3 * 4 * 2 * 64 * 64 * (128 // 64) * config.n_layer
    assert utilization.model_flops(config) == counted - 6 * 128 * 128 + recurrence


def test_peaks_are_by_card_and_precision():
    assert utilization.peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert utilization.peak_flops("NVIDIA H100 80GB HBM3", "fp32") == pytest.approx(66.9e12)
    assert utilization.peak_flops("cpu", "fp32") == 0


def test_flops_of_loops_branches_and_kernels():
    x = jnp.ones((8, 16))
    w = jnp.ones((16, 16))
    product = 2 * 8 * 16 * 16

    def count(function, *arguments):
        return cost.flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    def loop(x, w):
        return jax.lax.scan(lambda c, _: (jax.jit(jnp.dot)(c, w), None), x, length=5)[0]

    def branches(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    def kernel(x_ref, w_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], w_ref[...])

    def grid(x, w):
        whole = pl.BlockSpec((16, 16), lambda i: (0, 0))
        rows = pl.BlockSpec((2, 16), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct((8, 16), x.dtype)
        return pl.pallas_call(
            kernel, grid=(4,), in_specs=[rows, whole], out_specs=rows, out_shape=shape
        )(x, w)

    assert count(jnp.dot, x, w) == product
    assert count(jax.checkpoint(loop), x, w) == 5 * product
    assert count(branches, x, w) == 2 * product
    assert count(grid, x, w) == product


def test_memory_traffic_is_xlas_own_count_where_nothing_loops():
    def f(x, y):
        z = jnp.tanh(x @ y)
        return z.sum(0), z.T

    compiled = jax.jit(f).lower(jnp.ones((512, 256)), jnp.ones((256, 128))).compile()
    own = compiled.cost_analysis()["bytes accessed"]
    assert cost.memory_traffic(compiled.as_text()) == pytest.approx(own, rel=1e-3)


HLO = """
HloModule m

%slice_of (p0: f32[10,256], p1: s32[]) -> f32[256] {
  %p0 = f32[10,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %c = s32[] constant(0)
  %s = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %c), dynamic_slice_sizes={1,256}
  ROOT %b = f32[256]{0} bitcast(%s)
}

%update (p0: bf16[10,256], p1: f32[256], p2: s32[]) -> bf16[10,256] {
  %p0 = bf16[10,256]{1,0} parameter(0)
  %p1 = f32[256]{0} parameter(1)
  %n = bf16[256]{0} convert(%p1)
  %b = bf16[1,256]{1,0} bitcast(%n)
  %p2 = s32[] parameter(2)
  %c = s32[] constant(0)
  ROOT %u = bf16[10,256]{1,0} dynamic-update-slice(%p0, %b, %p2, %c)
}

%body (t: (s32[], f32[10,256], bf16[10,256])) -> (s32[], f32[10,256], bf16[10,256]) {
  %t = (s32[], f32[10,256]{1,0}, bf16[10,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[10,256]{1,0} get-tuple-element(%t), index=1
  %y = bf16[10,256]{1,0} get-tuple-element(%t), index=2
  %row = f32[256]{0} fusion(%x, %i), kind=kLoop, calls=%slice_of
  %new = bf16[10,256]{1,0} fusion(%y, %row, %i), kind=kLoop, calls=%update
  ROOT %r = (s32[], f32[10,256]{1,0}, bf16[10,256]{1,0}) tuple(%i, %x, %new)
}

%condition (t: (s32[], f32[10,256], bf16[10,256])) -> pred[] {
  ROOT %p = pred[] constant(true)
}

ENTRY %main (x: f32[10,256], y: bf16[10,256]) -> bf16[10,256] {
  %x = f32[10,256]{1,0} parameter(0)
  %y = bf16[10,256]{1,0} parameter(1)
  %z = s32[] constant(0)
  %t = (s32[], f32[10,256]{1,0}, bf16[10,256]{1,0}) tuple(%z, %x, %y)
  %w = (s32[], f32[10,256]{1,0}, bf16[10,256]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  ROOT %o = bf16[10,256]{1,0} get-tuple-element(%w), index=2
}
"""  # noqa: E501


def test_memory_traffic_of_slices_in_a_loop():
    row, index = 4 * 256, 4
    assert cost.memory_traffic(HLO) == 10 * (row + row + index + row + row // 2 + index)


ASYNCHRONOUS = """
HloModule m

%doubled (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  ROOT %n = f32[256]{0} add(%p, %p)
}

%row (p0: f32[10,256], p1: s32[]) -> f32[1,256] {
  %p0 = f32[10,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %s = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,256}
}

ENTRY %main (x: f32[10,256], i: s32[], y: f32[256]) -> f32[1024] {
  %x = f32[10,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[256]{0} parameter(2)
  %fusion-start = ((f32[10,256]{1,0}, s32[]), f32[1,256]{1,0}, u32[]) fusion-start(%x, %i), kind=kLoop, calls=%row
  %fusion-done = f32[1,256]{1,0} fusion-done(%fusion-start)
  %copy-start = (f32[256]{0}, f32[256]{0}, u32[]) copy-start(%y)
  %copy-done = f32[256]{0} copy-done(%copy-start)
  %async-start = ((f32[256]{0}), f32[256]{0}, u32[]) async-start(%y), calls=%doubled
  %async-update = ((f32[256]{0}), f32[256]{0}, u32[]) async-update(%async-start)
  %async-done = f32[256]{0} async-done(%async-update)
  %token = token[] after-all()
  %recv = (f32[256]{0}, u32[], token[]) recv(%token), channel_id=1
  %carried = (s32[], (f32[256]{0}, u32[], token[])) tuple(%i, %recv)
  %carry = (f32[256]{0}, u32[], token[]) get-tuple-element(%carried), index=1
  %recv-done = (f32[256]{0}, token[]) recv-done(%carry), channel_id=1
  %all-gather-start = (f32[256]{0}, f32[1024]{0}) all-gather-start(%y), dimensions={0}
  ROOT %all-gather-done = f32[1024]{0} all-gather-done(%all-gather-start)
}
"""  # noqa: E501


def test_memory_traffic_of_asynchronous_operations():
    """As if they were done at once: a slice, a copy, a sum of a value with itself, collectives."""
    row, index = 4 * 256, 4
    each = {"slice": 2 * row + index, "copy": 2 * row, "sum": 3 * row, "gathered": (1 + 4) * row}
    each["received"] = row + 4  # with a number
    assert cost.memory_traffic(ASYNCHRONOUS) == sum(each.values())
