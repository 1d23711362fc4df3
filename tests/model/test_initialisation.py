"""A fresh model against the published table of initial values, restated here in float64 numpy.

Exact values have to be the float64 ones rounded once to fp32; orthogonal matrices are checked by
QᵀQ = gain²·I (QQᵀ when they are wider than tall), the embedding by its range and moments.
"""

import itertools

import jax
import numpy as np
import pytest

from rwkv_jax.config import ModelConfig
from rwkv_jax.model.initialisation import init_params

CONFIGS = {
    "usual": ModelConfig(n_layer=3, n_embd=128, vocab_size=512),
    "one layer, V < C": ModelConfig(n_layer=1, n_embd=128, vocab_size=72),
    "head size 32, V = C, low-rank wider than C": ModelConfig(
        n_layer=2, n_embd=96, vocab_size=96, head_size=32, dim_w=128, dim_a=96, dim_v=112, dim_g=160
    ),
    "deep": ModelConfig(n_layer=12, n_embd=192, vocab_size=300),
}


def exact_values(config: ModelConfig, layer: int) -> dict[str, np.ndarray | float]:
    """The values of block `layer` that involve no chance, float64; names within the block."""
    L, C, N = config.n_layer, config.n_embd, config.head_size
    c = np.arange(C, dtype=np.float64)
    d, lin = c / C, c / (C - 1) - 0.5
    z = (c % N - (N - 1) / 2) / ((N - 1) / 2)
    zig = z * np.abs(z)
    r01 = layer / (L - 1) if L > 1 else 0.0
    r1 = 1 - layer / L
    return {
        "att.x_r": 1 - d ** (0.2 * r1),
        "att.x_w": 1 - d ** (0.9 * r1),
        "att.x_k": 1 - d ** (0.7 * r1),
        "att.x_v": 1 - d ** (0.7 * r1),
        "att.x_a": 1 - d ** (0.9 * r1),
        "att.x_g": 1 - d ** (0.2 * r1),
        "att.w0": -6 + 6 * (c / (C - 1)) ** (1 + r01**0.3) + 0.5 + 2.5 * zig,
        "att.a0": -0.19 + 0.3 * zig + 0.4 * lin,
        "att.v0": 0.73 - 0.4 * lin,
        "att.k_k": 0.71 - 0.1 * lin,
        "att.k_a": np.full(C, 1.02),
        "att.r_k": np.full((C // N, N), -0.04),
        "att.w1": np.zeros((C, config.dim_w)),
        "att.a1": np.zeros((C, config.dim_a)),
        "att.v1": np.zeros((C, config.dim_v)),
        "att.g1": np.zeros((C, config.dim_g)),
        "att.output.weight": np.zeros((C, C)),
        "att.ln_x.weight": np.full(C, ((1 + layer) / L) ** 0.7),
        "att.ln_x.bias": np.zeros(C),
        "ffn.x_k": 1 - d ** (r1**4),
        "ffn.value.weight": np.zeros((C, 4 * C)),
        "ln1.weight": np.ones(C),
        "ln1.bias": np.zeros(C),
        "ln2.weight": np.ones(C),
        "ln2.bias": np.zeros(C),
    }


def orthogonal_gains(config: ModelConfig) -> dict[str, tuple[tuple[int, int], float]]:
    """Shape and gain of the orthogonal matrices of any block; names within the block."""
    C = config.n_embd

    def low_rank(width: int) -> tuple[tuple[int, int], float]:
        return (width, C), 0.1 * max(1.0, (width / C) ** 0.5)

    return {
        "att.w2": low_rank(config.dim_w),
        "att.a2": low_rank(config.dim_a),
        "att.v2": low_rank(config.dim_v),
        "att.g2": low_rank(config.dim_g),
        "att.receptance.weight": ((C, C), 1.0),
        "att.key.weight": ((C, C), 0.1),
        "att.value.weight": ((C, C), 1.0),
        "ffn.key.weight": ((4 * C, C), 1.0),
    }


def flatten(params: dict) -> dict[str, np.ndarray]:
    """Our nested tree as dotted name → array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def fresh(request) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    return request.param, flatten(init_params(request.param, 0))


def orthogonal_matrices(config: ModelConfig, tensors: dict[str, np.ndarray]):
    """(name, matrix in float64, gain) of each orthogonal matrix of a fresh model."""
    V, C = config.vocab_size, config.n_embd
    head_gain = 0.5 * (V / C) ** 0.5 if V > C else 0.5
    yield "head.weight", tensors["head.weight"].astype(np.float64), head_gain
    for name, (shape, gain) in orthogonal_gains(config).items():
        stacked = tensors[f"blocks.{name}"].astype(np.float64)
        assert stacked.shape == (config.n_layer, *shape), name
        for layer, matrix in enumerate(stacked):
            yield f"blocks.{layer}.{name}", matrix, gain


def test_every_tensor_is_in_the_table_and_fp32(fresh):
    config, tensors = fresh
    blocks = {**exact_values(config, 0), **orthogonal_gains(config)}
    norms = {f"{norm}.{part}" for norm in ("ln0", "ln_out") for part in ("weight", "bias")}
    expected = {"emb.weight", "head.weight", *norms, *(f"blocks.{name}" for name in blocks)}
    assert set(tensors) == expected
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


def test_exact_values(fresh):
    config, tensors = fresh
    C = config.n_embd
    for norm in ("ln0", "ln_out"):
        np.testing.assert_array_equal(tensors[f"{norm}.weight"], np.ones(C, np.float32))
        np.testing.assert_array_equal(tensors[f"{norm}.bias"], np.zeros(C, np.float32))
    for layer in range(config.n_layer):
        for name, value in exact_values(config, layer).items():
            actual = tensors[f"blocks.{name}"]
            assert actual.shape == (config.n_layer, *value.shape), name
            np.testing.assert_array_equal(
                actual[layer], value.astype(np.float32), err_msg=f"blocks.{layer}.{name}"
            )


def test_orthogonal_matrices(fresh):
    config, tensors = fresh
    assert tensors["head.weight"].shape == (config.vocab_size, config.n_embd)
    for name, matrix, gain in orthogonal_matrices(config, tensors):
        rows, cols = matrix.shape
        gram = matrix.T @ matrix if rows >= cols else matrix @ matrix.T
        np.testing.assert_allclose(
            gram / gain**2, np.eye(min(rows, cols)), rtol=0, atol=5e-6, err_msg=name
        )


def test_orthogonal_matrices_are_random_and_independent(fresh):
    config, tensors = fresh
    matrices = {n: m / np.linalg.norm(m) for n, m, _ in orthogonal_matrices(config, tensors)}
    for (n1, m1), (n2, m2) in itertools.combinations(matrices.items(), 2):
        if m1.shape == m2.shape:  # a cosine of about ±1/√(entries) between independent ones
            assert abs(np.vdot(m1, m2)) < 6 / m1.size**0.5, (n1, n2)
    # QR without the sign correction makes the first entry of every matrix negative.
    assert {np.sign(m[0, 0]) for m in matrices.values()} == {-1.0, 1.0}


def test_embedding_is_uniform(fresh):
    config, tensors = fresh
    emb = tensors["emb.weight"].astype(np.float64) / 1e-4
    assert emb.shape == (config.vocab_size, config.n_embd)
    assert np.abs(emb).max() <= 1 and emb.min() < -0.99 and emb.max() > 0.99
    n = emb.size  # each mean within 5 standard errors of that of a uniform on ±1
    assert abs(emb.mean()) < 5 * (1 / 3 / n) ** 0.5
    assert abs((emb**2).mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    assert abs((emb**4).mean() - 1 / 5) < 5 * (16 / 225 / n) ** 0.5
    assert len(np.unique(emb, axis=0)) == config.vocab_size


def test_the_seed_decides_the_chance_and_nothing_else():
    config = CONFIGS["one layer, V < C"]
    one, same, other = (flatten(init_params(config, s)) for s in (1, 1, 2))
    differing = {n.removeprefix("blocks.") for n in one if not np.array_equal(one[n], other[n])}
    assert all(np.array_equal(one[n], same[n]) for n in one)
    assert differing == {"emb.weight", "head.weight", *orthogonal_gains(config)}
