"""The torch side reproduces the oracles: so what agrees with it agrees with them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import torch_rwkv7

pytestmark = pytest.mark.torch
ORACLES = Path(__file__).parents[1] / "data" / "oracles"


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", ["init_fp32", "rand_fp32", "rand_bf16"])
@pytest.mark.parametrize("pieces", [[96], [31, 65], [1] * 96], ids=["whole", "two", "single"])
def test_logits_and_state_of_the_oracles(name, dtype, atol, pieces):
    oracle = np.load(ORACLES / f"tiny_v512_{name}.npz")
    params = torch.load(ORACLES / f"tiny_v512_{name}.pth", weights_only=True)
    params = {name: p.to(dtype) for name, p in params.items()}
    logits, state = [], None
    for tokens in torch.from_numpy(oracle["tokens"]).split(pieces):
        piece, state = torch_rwkv7.forward(params, tokens[None], state)
        logits.append(piece[0])

    def check(actual, expected):
        np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=atol)

    check(torch.cat(logits), oracle["logits"])
    check(state.wkv[:, 0], oracle["state"])
    check(state.shift_att[:, 0], oracle["shift_att"])
    check(state.shift_ffn[:, 0], oracle["shift_ffn"])


def test_l2wrap_enters_only_the_gradient_of_the_largest_logit():
    logits = torch.tensor([[[1.0, -3.0, 2.0], [-5.0, -4.0, -6.0]]], requires_grad=True)
    (grad,) = torch.autograd.grad(torch_rwkv7.l2wrap(logits), logits)
    expected = torch.tensor([[[0.0, 0.0, 2.0], [0.0, -4.0, 0.0]]]) * 1e-4 / 2
    torch.testing.assert_close(grad, expected)
