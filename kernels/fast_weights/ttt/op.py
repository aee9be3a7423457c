"""TTT layers over a sequence, a mini-batch at a time: TTT-Linear and TTT-MLP.

    impl       what runs                                      gradients      without
    triton     our kernels (`triton.py`), TTT-Linear only     first order    float64, wide heads,
                                                                             long mini-batches
    interpret  the same, interpreted on the CPU, for tests    first order    likewise
    torch      the dual form in matrix products, mini-batch   of any order   -
               after mini-batch
    auto       triton on a GPU, else torch; `kernels.record` says which, and why

The dual form never makes the weights of a token (arXiv:2407.04620, section 2.5). For a mini-batch
that begins at W, b, with rows of Q, K, V for its tokens and o the elementwise product:

    Z = K W + b,  G = d/dZ 1/2 |LN(Z) - (V - K)|^2,  eta_ts = position_t rate_s for s <= t, else 0
    output of the model before its norm:  Q W + b - (eta o Q K^T) G - eta G
    W' = W - (eta_last o K)^T G,  b' = b - sum eta_last o G

An MLP does the same in each layer, with what enters the layer for K and Q, and its G for G.

Dimensions: b batch, t tokens, h heads, d width of a head, f hidden width of the MLP, c tokens of a
mini-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.dispatch import resolve

EPS = 1e-6
"Added to the variance inside the norm."
WIDEST = 64
"Width of heads that the kernels take; in float32 half of it."
LONGEST = 16
"Tokens of a mini-batch that the kernels take: the paper's number."


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
    name, (b, _, h, d) = "ttt_linear", q.shape if q.ndim == 4 else (0, 0, 0, 0)
    shapes = {"weight": (weight, (b, h, d, d)), "bias": (bias, (b, h, d))}
    check(name, q, k, v, rate, position, norm_weight, norm_bias, shapes)
    refusal = refused(q, k, v, position)
    chosen = resolve(name, impl, device=q.device, table="ttt_states", refusal=refusal)
    if chosen == "torch":
        with torch.autocast(q.device.type, enabled=False):
            given = q, k, v, rate, position, [weight, bias]
            out, (weight, bias) = dual(*given, norm_weight, norm_bias)
        return out, weight, bias
    from kernels.fast_weights.ttt.launch import ttt_linear as launched

    out, weight, bias, *_ = launched(q, k, v, rate, position, weight, bias, norm_weight, norm_bias)
    return out, weight, bias


def refused(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> str | None:
    """Why the kernels cannot compute this call; None if they can."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    widest = WIDEST // 2 if q.dtype == torch.float32 else WIDEST
    if q.shape[-1] > widest:
        return f"heads of width {q.shape[-1]} are over {widest}, what the kernels hold in {q.dtype}"
    if len(position) > LONGEST:
        return f"mini-batches of {len(position)} tokens are over {LONGEST}, what the kernels hold"
    return None


def ttt_mlp(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h d"],
    rate: Float[Tensor, "b t h"],
    position: Float[Tensor, " c"],
    state: tuple[
        Float[Tensor, "b h d f"],
        Float[Tensor, "b h f"],
        Float[Tensor, "b h f d"],
        Float[Tensor, "b h d"],
    ],
    norm_weight: Float[Tensor, "h d"],
    norm_bias: Float[Tensor, "h d"],
) -> tuple[Float[Tensor, "b t h d"], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """As `ttt_linear`, with gelu(x W1 + b1) W2 + b2 for the model; in plain operators only.

    `state` is W1, b1, W2, b2; gelu is its tanh approximation.
    """
    name, (b, _, h, d) = "ttt_mlp", q.shape if q.ndim == 4 else (0, 0, 0, 0)
    f = state[0].shape[-1]
    wanted = [(b, h, d, f), (b, h, f), (b, h, f, d), (b, h, d)]
    shapes = dict(zip(("W1", "b1", "W2", "b2"), zip(state, wanted, strict=True), strict=True))
    check(name, q, k, v, rate, position, norm_weight, norm_bias, shapes)
    resolve(name, "torch", device=q.device, table="")
    with torch.autocast(q.device.type, enabled=False):
        out, (w1, b1, w2, b2) = dual(q, k, v, rate, position, state, norm_weight, norm_bias)
    return out, (w1, b1, w2, b2)


def dual(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h d"],
    rate: Float[Tensor, "b t h"],
    position: Float[Tensor, " c"],
    state: Sequence[Tensor],  # weight and bias of each layer in turn
    norm_weight: Float[Tensor, "h d"],
    norm_bias: Float[Tensor, "h d"],
) -> tuple[Float[Tensor, "b t h d"], list[Tensor]]:
    """The matrix form in plain operators, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.transpose(1, 2).to(wide) for x in (q, k, v))  # [b, h, t, d]
    rates, position = rate.transpose(1, 2).to(wide), position.to(wide)  # [b, h, t]
    norm = norm_weight.to(wide)[:, None], norm_bias.to(wide)[:, None]  # [h, 1, d] each
    # A bias is a row, [b, h, 1, d], so that it is added to every token.
    layers = [
        (w.to(wide), b.to(wide)[:, :, None]) for w, b in zip(state[::2], state[1::2], strict=True)
    ]
    out, c, steps = [], len(position), q.shape[1]
    for begin in range(0, steps, c):
        here = slice(begin, min(begin + c, steps))
        qs, ks, vs = queries[:, :, here], keys[:, :, here], values[:, :, here]
        eta = (position[: qs.shape[2], None] * rates[:, :, None, here]).tril()  # [b, h, c, c]
        inputs, gradients = inner_gradients(layers, ks, vs - ks, norm)
        last, x, stepped = eta[:, :, -1, :, None], qs, []
        for index, (w, b) in enumerate(layers):
            x = F.gelu(x, approximate="tanh") if index else x
            given, grad = inputs[index], gradients[index]
            x = x @ w + b - (eta * (x @ given.mT)) @ grad - eta @ grad
            stepped.append(
                (w - (last * given).mT @ grad, b - (last * grad).sum(dim=2, keepdim=True))
            )
        layers = stepped
        out.append(qs + layer_norm(x, *norm))
    joined = torch.cat(out, dim=2).transpose(1, 2).to(v.dtype)
    return joined, [x for w, b in layers for x in (w, b[:, :, 0])]


def inner_gradients(
    layers: Sequence[tuple[Tensor, Tensor]],
    keys: Float[Tensor, "b h c d"],
    target: Float[Tensor, "b h c d"],
    norm: tuple[Tensor, Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """What enters each layer for the keys, and each token's gradient at the layer's output."""
    inputs, outputs, x = [], [], keys
    for index, (w, b) in enumerate(layers):
        x = F.gelu(x, approximate="tanh") if index else x
        inputs.append(x)
        x = x @ w + b
        outputs.append(x)
    gradients = [norm_loss_gradient(x, target, *norm)]
    for index in range(len(layers) - 1, 0, -1):
        back = gradients[0] @ layers[index][0].mT
        gradients.insert(0, back * gelu_slope(outputs[index - 1]))
    return inputs, gradients


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


def gelu_slope(x: Tensor) -> Tensor:
    """d/dx of gelu in its tanh approximation, x/2 (1 + tanh(s (x + 0.044715 x^3)))."""
    s = (2 / torch.pi) ** 0.5
    tanh = torch.tanh(s * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * s * (1 + 3 * 0.044715 * x.square())


def check(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    position: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    state: dict[str, tuple[Tensor, tuple[int, ...]]],
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
        **state,
        "norm_weight": (norm_weight, (h, d)),
        "norm_bias": (norm_bias, (h, d)),
    }
    for what, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name}: {what} must be {list(shape)}, got {list(x.shape)}")
    if position.ndim != 1 or len(position) == 0:
        raise ValueError(f"{name}: position must be [c] with c >= 1, got {list(position.shape)}")
