"""The definition of TTT-Linear and TTT-MLP, token by token, their gradients by autograd.

Learning to (Learn at Test Time): RNNs with Expressive Hidden States, 2024, arXiv:2407.04620,
section 2. The state of a head is a model, LN(x W + b) or LN(gelu(x W1 + b1) W2 + b2), whose norm
has a learned scale and shift. Token s of a mini-batch of c tokens that began at W_0 has the loss

    l_s(W) = 1/2 | f(k_s; W) - (v_s - k_s) |^2

and the output of token t reads the model after the tokens up to its own,

    W_t = W_0 - sum_{s<=t} eta_ts grad l_s(W_0)        eta_ts = position_t rate_s
    o_t = q_t + f(q_t; W_t)

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


def ttt(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h d"],
    rate: Float[Tensor, "b t h"],
    position: Float[Tensor, " c"],
    state: list[Tensor],  # weight and bias of each layer in turn, [b, h, ...]
    norm_weight: Float[Tensor, "h d"],
    norm_bias: Float[Tensor, "h d"],
) -> tuple[Float[Tensor, "b t h d"], list[Tensor]]:
    """Outputs in the dtype of v, and the state after the last token."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_, rate_, position_ = (x.to(wide) for x in (q, k, v, rate, position))
    out = torch.zeros_like(v_)
    last = [torch.zeros_like(x, dtype=wide) for x in state]
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            gamma, beta = norm_weight[head].to(wide), norm_bias[head].to(wide)

            def model(x: Tensor, params: list[Tensor], gamma=gamma, beta=beta) -> Tensor:
                for layer in range(0, len(params), 2):
                    x = F.gelu(x, approximate="tanh") if layer else x
                    x = x @ params[layer] + params[layer + 1]
                return F.layer_norm(x, x.shape[-1:], gamma, beta, EPS)

            params = [x[row, head].to(wide) for x in state]
            for begin in range(0, q.shape[1], len(position)):
                start, total = params, [torch.zeros_like(x) for x in params]
                for t in range(begin, min(begin + len(position), q.shape[1])):
                    key, value, query = k_[row, t, head], v_[row, t, head], q_[row, t, head]

                    def loss(params: list[Tensor], key=key, value=value, model=model) -> Tensor:
                        return 0.5 * (model(key, params) - (value - key)).square().sum()

                    gradient = torch.func.grad(loss)(start)
                    rate_here = rate_[row, t, head]
                    total = [a + rate_here * g for a, g in zip(total, gradient, strict=True)]
                    step = position_[t - begin]
                    params = [w - step * a for w, a in zip(start, total, strict=True)]
                    out[row, t, head] = query + model(query, params)
            for whole, part in zip(last, params, strict=True):
                whole[row, head] = part
    return out.to(v.dtype), last
