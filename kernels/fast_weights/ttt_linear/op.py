"""TTT-Linear over a sequence, a mini-batch at a time.

    impl       what runs                                                    gradients
    torch      the dual form in matrix products, mini-batch after           of any order
               mini-batch
    auto       torch

The dual form never makes the weights of a token (arXiv:2407.04620, section 2.5). For a mini-batch
that begins at W, b, with rows of Q, K, V for its tokens and o the elementwise product:

    Z = K W + b,  G = d/dZ 1/2 |LN(Z) - (V - K)|^2,  eta_ts = position_t rate_s for s <= t, else 0
    output of the model before its norm:  Q W + b - (eta o Q K^T) G - eta G
    W' = W - (eta_last o K)^T G,  b' = b - sum eta_last o G

Dimensions: b batch, t tokens, h heads, d width of a head, c tokens of a mini-batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.dispatch import resolve

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
    *,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b h d d"], Float[Tensor, "b h d"]]:
    """Outputs of a linear model per head that is trained on the sequence as it reads it.

    Args:
        q, k, v: views of each token; the model learns to map k to v - k.
        rate: learning rate of each token, >= 0.
        position: factor of the step by the place of the reading token in its mini-batch, whose
            length c it sets; 1 / (1 + place) averages the gradients.
        weight, bias: of the model where the sequence begins.
        norm_weight, norm_bias: of the layer norm after the model, not trained on the sequence.
        impl: one of those above.
    Returns:
        q + LN(q W + b) in the dtype of v, with W, b after the token itself; and weight and bias
        after the last token, in float32 (float64 for float64). A sequence may be continued from
        them after a whole number of mini-batches.
    Raises:
        ValueError: shapes that contradict each other, or an `impl` that cannot run.
    """
    check("ttt_linear", q, k, v, rate, position, weight, bias, norm_weight, norm_bias)
    resolve("ttt_linear", impl, device=q.device, table="", refusal="it has no kernels yet")
    return dual(q, k, v, rate, position, weight, bias, norm_weight, norm_bias)


def dual(
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
    """The matrix form in plain operators, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.transpose(1, 2).to(wide) for x in (q, k, v))  # [b, h, t, d]
    rates, position = rate.transpose(1, 2).to(wide), position.to(wide)  # [b, h, t]
    gamma, beta = norm_weight.to(wide)[:, None], norm_bias.to(wide)[:, None]  # [h, 1, d]
    w, b, out = weight.to(wide), bias.to(wide)[:, :, None], []
    c, steps = len(position), q.shape[1]
    for begin in range(0, steps, c):
        here = slice(begin, min(begin + c, steps))
        qs, ks, vs = queries[:, :, here], keys[:, :, here], values[:, :, here]
        eta = (position[: qs.shape[2], None] * rates[:, :, None, here]).tril()  # [b, h, c, c]
        grad = norm_loss_gradient(ks @ w + b, vs - ks, gamma, beta)
        z = qs @ w + b - (eta * (qs @ ks.mT)) @ grad - eta @ grad
        out.append(qs + layer_norm(z, gamma, beta))
        last = eta[:, :, -1, :, None]  # [b, h, c, 1]
        w = w - (last * ks).mT @ grad
        b = b - (last * grad).sum(dim=2, keepdim=True)
    return torch.cat(out, dim=2).transpose(1, 2).to(v.dtype), w, b[:, :, 0]


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + EPS) gamma + beta over the last dimension."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * (centred.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * gamma + beta


def norm_loss_gradient(z: Tensor, target: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """d/dz of 1/2 |LN(z) - target|^2, over the last dimension."""
    centred = z - z.mean(dim=-1, keepdim=True)
    inverse = (centred.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    unit = centred * inverse
    slope = (unit * gamma + beta - target) * gamma  # d loss / d unit
    along = (slope * unit).mean(dim=-1, keepdim=True)
    return inverse * (slope - slope.mean(dim=-1, keepdim=True) - unit * along)


def check(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> None:
    """Refuse shapes that contradict each other."""
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape or 0 in q.shape:
        raise ValueError(
            f"{name}: q, k and v must be [b, t, h, d] and not empty, got {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)}"
        )
    b, t, h, d = q.shape
    expected = {
        "rate": (rate, (b, t, h)),
        "weight": (weight, (b, h, d, d)),
        "bias": (bias, (b, h, d)),
        "norm_weight": (norm_weight, (h, d)),
        "norm_bias": (norm_bias, (h, d)),
    }
    for what, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name}: {what} must be {list(shape)}, got {list(x.shape)}")
    if position.ndim != 1 or len(position) == 0:
        raise ValueError(f"{name}: position must be [c] with c >= 1, got {list(position.shape)}")
