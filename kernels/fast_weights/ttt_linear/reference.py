"""The definition of TTT-Linear, token by token, its gradients by autograd.

Learning to (Learn at Test Time): RNNs with Expressive Hidden States, 2024, arXiv:2407.04620,
section 2. The state of a head is a model f(x) = LN(x W + b) with a learned scale and shift; token s
of a mini-batch of c tokens, which began at W_0, has the loss

    l_s(W) = 1/2 | LN(k_s W + b) - (v_s - k_s) |^2

and the output of token t reads the model after the tokens up to its own,

    W_t = W_0 - sum_{s<=t} eta_ts grad l_s(W_0)        eta_ts = position_t rate_s
    o_t = q_t + LN(q_t W_t + b_t)

The next mini-batch begins at the last W_t. Written to be checked by eye, shares no code with the
fast paths; float64 stays float64, anything narrower than float32 is computed in float32. Arguments
as in `op.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPS = 1e-6
"Added to the variance inside the norm."


def ttt_linear(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h d"],
    rate: Float[Tensor, "b t h"],
    position: Float[Tensor, " c"],
    weight: Float[Tensor, "b h d d"],
    bias: Float[Tensor, "b h d"],
    norm_weight: Float[Tensor, "h d"],
    norm_bias: Float[Tensor, "h d"],
) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b h d d"], Float[Tensor, "b h d"]]:
    """Outputs in the dtype of v, and the state after the last token."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_, rate_, position_ = (x.to(wide) for x in (q, k, v, rate, position))
    out = torch.zeros_like(v_)
    last_w, last_b = torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            gamma, beta = norm_weight[head].to(wide), norm_bias[head].to(wide)

            def model(x: Tensor, w: Tensor, b: Tensor, gamma=gamma, beta=beta) -> Tensor:
                return F.layer_norm(x @ w + b, x.shape[-1:], gamma, beta, EPS)

            w, b = weight[row, head].to(wide), bias[row, head].to(wide)
            for begin in range(0, q.shape[1], len(position)):
                at_w, at_b, stepped_w, stepped_b = w, b, w, b
                sum_w, sum_b = torch.zeros_like(w), torch.zeros_like(b)
                for t in range(begin, min(begin + len(position), q.shape[1])):
                    key, value = k_[row, t, head], v_[row, t, head]

                    def loss(w: Tensor, b: Tensor, key=key, value=value, model=model) -> Tensor:
                        return 0.5 * (model(key, w, b) - (value - key)).square().sum()

                    grad_w, grad_b = torch.func.grad(loss, argnums=(0, 1))(at_w, at_b)
                    sum_w = sum_w + rate_[row, t, head] * grad_w
                    sum_b = sum_b + rate_[row, t, head] * grad_b
                    stepped_w = at_w - position_[t - begin] * sum_w
                    stepped_b = at_b - position_[t - begin] * sum_b
                    query = q_[row, t, head]
                    out[row, t, head] = query + model(query, stepped_w, stepped_b)
                w, b = stepped_w, stepped_b
            last_w[row, head], last_b[row, head] = w, b
    return out.to(v.dtype), last_w, last_b
