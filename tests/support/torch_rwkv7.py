"""RWKV-7 and its training step in plain torch: what our JAX code is measured against.

Written from the published equations alone, one line of code a line of mathematics, with
autograd, `torch.optim.AdamW` and a WKV that steps through the tokens. It shares no code with
`rwkv_jax`, reads and changes the official flat dict (name → tensor), and computes in the dtype
of that dict, float64 included.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = Mapping[str, Tensor]


class State(NamedTuple):
    """What a model carries from one token to the next."""

    wkv: Tensor  # [L, B, H, N, N], value row, key column
    shift_att: Tensor  # [L, B, C], the last input of each time mix
    shift_ffn: Tensor  # [L, B, C], … of each channel mix


def zero_state(params: Parameters, batch: int) -> State:
    emb = params["emb.weight"]
    n_layer = sum(name.endswith(".att.r_k") for name in params)
    n_head, head_size = params["blocks.0.att.r_k"].shape
    shift = emb.new_zeros(n_layer, batch, emb.shape[1])
    return State(emb.new_zeros(n_layer, batch, n_head, head_size, head_size), shift, shift)


def wkv(
    r: Tensor, decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t = S_t r_t, S_t = S_{t−1} diag(decay_t) + (S_{t−1} a_t) b_tᵀ + v_t k_tᵀ.

    All of [B, T, H, N] but the state s [B, H, N, N]; returns y [B, T, H, N] and the last state.
    """
    ys = []
    # unbind, not indexing by t: the backward of x[:, t] fills a [B, T, H, N] with zeros
    inputs = (x.unbind(1) for x in (r, decay, k, v, a, b))
    for r_t, decay_t, k_t, v_t, a_t, b_t in zip(*inputs, strict=True):
        sa = s @ a_t[..., None]  # [B, H, N, 1]
        s = s * decay_t[..., None, :] + sa @ b_t[..., None, :] + v_t[..., None] @ k_t[..., None, :]
        ys.append((s @ r_t[..., None])[..., 0])
    return torch.stack(ys, 1), s


def shift(x: Tensor, last: Tensor) -> Tensor:
    """x [B, T, C] delayed by one token, `last` [B, C] at the front."""
    return torch.cat([last[:, None], x[:, :-1]], 1)


def time_mix(
    p: Parameters, x: Tensor, v_first: Tensor | None, last: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output [B, T, C], v_first [B, T, C] and the last state [B, H, N, N]."""
    B, T, C = x.shape
    H, N = p["r_k"].shape
    xx = shift(x, last) - x
    x_r, x_w, x_k, x_v, x_a, x_g = (x + xx * p[f"x_{c}"] for c in "rwkvag")

    r = x_r @ p["receptance.weight"].T
    k = x_k @ p["key.weight"].T
    v = x_v @ p["value.weight"].T
    d = p["w0"] + torch.tanh(x_w @ p["w1"]) @ p["w2"]
    decay = torch.exp(-torch.exp(-F.softplus(-d) - 0.5))
    a = torch.sigmoid(p["a0"] + (x_a @ p["a1"]) @ p["a2"])
    g = torch.sigmoid(x_g @ p["g1"]) @ p["g2"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"] + (x_v @ p["v1"]) @ p["v2"])
    kk = F.normalize((k * p["k_k"]).view(B, T, H, N), dim=-1, eps=1e-12)
    k = k * (1 + (a - 1) * p["k_a"])

    r, decay, k, v, a = (z.view(B, T, H, N) for z in (r, decay, k, v, a))
    y, s = wkv(r, decay, k, v, -kk, kk * a, s)
    y = F.group_norm(y.reshape(B * T, C), H, p["ln_x.weight"], p["ln_x.bias"], eps=64e-5)
    bonus = (r * k * p["r_k"]).sum(-1, keepdim=True) * v  # [B, T, H, N]
    y = y.view(B, T, C) + bonus.reshape(B, T, C)
    return (y * g) @ p["output.weight"].T, v_first, s


def channel_mix(p: Parameters, x: Tensor, last: Tensor) -> Tensor:
    k = torch.relu((x + (shift(x, last) - x) * p["x_k"]) @ p["key.weight"].T) ** 2
    return k @ p["value.weight"].T


def forward(params: Parameters, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Logits [B, T, V] of tokens [B, T], and the state after the last one."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): p for k, p in params.items() if k.startswith(prefix)}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"], eps=1e-5
        )

    state = state or zero_state(params, tokens.shape[0])
    wkvs, shifts_att, shifts_ffn = [], [], []
    v_first = None
    x = norm(F.embedding(tokens, params["emb.weight"]), "blocks.0.ln0")
    for layer in range(len(state.wkv)):
        block = f"blocks.{layer}"
        h = norm(x, f"{block}.ln1")
        out, v_first, s = time_mix(
            under(f"{block}.att."), h, v_first, state.shift_att[layer], state.wkv[layer]
        )
        x = x + out
        wkvs.append(s)
        shifts_att.append(h[:, -1])
        h = norm(x, f"{block}.ln2")
        x = x + channel_mix(under(f"{block}.ffn."), h, state.shift_ffn[layer])
        shifts_ffn.append(h[:, -1])
    logits = norm(x, "ln_out") @ params["head.weight"].T
    return logits, State(torch.stack(wkvs), torch.stack(shifts_att), torch.stack(shifts_ffn))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all tokens of logits [B, T, V] and targets [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def l2wrap(logits: Tensor) -> Tensor:
    """Its gradient is L2Wrap: maxlogit · 1e-4/(B·T) at each token's largest logit, 0 elsewhere."""
    largest = logits.max(-1).values  # [B, T]
    return largest.square().sum() * (0.5e-4 / largest.numel())


def adamw(params: Parameters, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the three groups: decayed, 1x, and 2x the learning rate. lr is set by the step."""
    groups: dict[str, list[Tensor]] = {"decay": [], "1x": [], "2x": []}
    for name, p in params.items():
        if name.endswith(".att.w0"):
            groups["2x"].append(p)
        elif name.endswith(".weight") and sum(n > 1 for n in p.shape) >= 2:
            groups["decay"].append(p)
        else:
            groups["1x"].append(p)
    return torch.optim.AdamW(
        [
            {"params": groups["decay"], "lr_scale": 1.0, "weight_decay": weight_decay},
            {"params": groups["1x"], "lr_scale": 1.0, "weight_decay": 0.0},
            {"params": groups["2x"], "lr_scale": 2.0, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(0.9, 0.99),
        eps=1e-18,
    )


def learning_rate(
    step: int,
    *,
    lr_init: float,
    lr_final: float,
    warmup_steps: int,
    tokens_per_step: int,
    exit_tokens: int,
) -> float:
    """Cosine from lr_init to lr_final over the tokens after the warmup, times a linear warmup."""
    tokens, warm = step * tokens_per_step, warmup_steps * tokens_per_step
    progress = min(max((tokens - warm) / (exit_tokens - warm), 0.0), 1.0)
    f = lr_final / lr_init
    lr = lr_init * ((0.5 + f / 2) + (0.5 - f / 2) * math.cos(math.pi * progress))
    if step < warmup_steps:
        lr *= 0.01 + 0.99 * step / warmup_steps
    return lr


def train_step(
    params: Parameters,
    optimizer: torch.optim.AdamW,
    tokens: Tensor,
    targets: Tensor,
    lr: float,
    grad_clip: float = 1.0,
) -> tuple[float, float]:
    """One update in place. Returns the mean cross-entropy before it and the unclipped norm."""
    logits, _ = forward(params, tokens)
    loss = cross_entropy(logits, targets)
    optimizer.zero_grad()
    (loss + l2wrap(logits)).backward()
    norm = torch.nn.utils.clip_grad_norm_(params.values(), grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    return loss.item(), norm.item()
