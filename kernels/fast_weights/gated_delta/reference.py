"""The definition of the gated delta rule, token by token.

Gated Delta Networks: Improving Mamba2 with Delta Rule, 2024, arXiv:2412.06464, eq. 10; with g = 0
the delta rule of Parallelizing Linear Transformers with the Delta Rule, 2024, arXiv:2406.06484.

    S_t = exp(g_t) S_{t-1}                          the memory fades
    S_t = S_t + beta_t k_t (v_t - S_t^T k_t)^T      one step of SGD on 1/2 |S^T k - v|^2
    o_t = scale S_t^T q_t

Written to be checked by eye, shares no code with the fast paths. float64 stays float64; anything
narrower than float32 is computed in float32. Arguments as in `op.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gated_delta_rule(
    q: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    v: Float[Tensor, "b t h dv"],
    beta: Float[Tensor, "b t h"],
    g: Float[Tensor, "b t h"] | None = None,
    *,
    state: Float[Tensor, "b h dk dv"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv"]]:
    """Outputs in the dtype of v, and the last state."""
    wide = torch.promote_types(q.dtype, torch.float32)
    b, t, h, dk = q.shape
    scale = dk**-0.5 if scale is None else scale
    memory = q.new_zeros(b, h, dk, v.shape[-1], dtype=wide) if state is None else state.to(wide)
    out = []
    for i in range(t):
        key, value, query = k[:, i].to(wide), v[:, i].to(wide), q[:, i].to(wide)  # [b, h, d]
        if g is not None:
            memory = memory * g[:, i].to(wide).exp()[..., None, None]
        error = value - torch.einsum("bhkv,bhk->bhv", memory, key)
        memory = memory + torch.einsum("bh,bhk,bhv->bhkv", beta[:, i].to(wide), key, error)
        out.append(scale * torch.einsum("bhkv,bhk->bhv", memory, query))
    return torch.stack(out, dim=1).to(v.dtype), memory
