"""The gated delta rule over a sequence, chunk by chunk.

    impl       what runs                                        gradients      without
    triton     our kernels (`triton.py`)                        first order    float64, wide keys
    interpret  the same, interpreted on the CPU, for tests      first order    float64, wide keys
    torch      chunks of `CHUNK` tokens in matrix products      of any order   -
    auto       triton on a GPU, else torch; `kernels.record` says which, and why

Within a chunk that begins at state S, with c_i the sum of g up to token i, the corrections
u_i = beta_i (v_i - exp(g_i) S_{i-1}^T k_i) solve a unit lower triangular system (the WY or UT
transform of arXiv:2406.06484, section 3):

    u_i + beta_i sum_{j<i} exp(c_i - c_j) (k_i . k_j) u_j = beta_i (v_i - exp(c_i) S^T k_i)
    o_i = scale (exp(c_i) S^T q_i + sum_{j<=i} exp(c_i - c_j) (q_i . k_j) u_j)
    S'  = exp(c_C) S + sum_j exp(c_C - c_j) k_j u_j^T

Dimensions: b batch, t tokens, h heads, dk width of keys and queries, dv of values, n chunks, c
tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kernels.dispatch import resolve

CHUNK = 64
"Tokens that are solved for together."
WIDEST = 128
"Width of keys that the kernels take; in float32 half of it."


def gated_delta_rule(
    q: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    v: Float[Tensor, "b t h dv"],
    beta: Float[Tensor, "b t h"],
    g: Float[Tensor, "b t h"] | None = None,
    *,
    state: Float[Tensor, "b h dk dv"] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv"]]:
    """What a linear memory, corrected token by token, answers to the queries.

    Args:
        q: queries.
        k: keys of unit length: a longer one would make the memory overshoot, and then explode.
        v: values.
        beta: step size of each token's correction, in [0, 2]; below 1 it moves towards the value.
        g: log of the factor by which the memory fades before each token, <= 0; None: it does not.
        state: memory to begin with, float32 or wider; None: zero.
        scale: of the output; None: dk ** -0.5.
        impl: one of those above.
    Returns:
        Outputs in the dtype of v, and the memory after the last token, in float32 (float64 for
        float64), from which the sequence can be continued.
    Raises:
        ValueError: shapes that contradict each other, an `impl` that cannot run, or, on the CPU,
            keys longer than 1 or g above 0. On a GPU nobody looks, which would mean to wait, nor
            in a compiled graph.
    """
    check("gated_delta_rule", q, k, v, beta, g, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g = torch.zeros_like(beta) if g is None else g
    refusal = refused(q, k, v)
    chosen = resolve(
        "gated_delta_rule", impl, device=q.device, table="delta_solve", refusal=refusal
    )
    if chosen == "torch":
        with torch.autocast(q.device.type, enabled=False):
            return chunked(q, k, v, beta, g, state, scale)
    from kernels.fast_weights.gated_delta.launch import gated_delta

    out, last, *_ = gated_delta(q, k, v, beta, g, state, scale)
    return out, last


def refused(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot compute this call; None if they can."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
    widest = WIDEST // 2 if q.dtype == torch.float32 else WIDEST
    if q.shape[-1] > widest:
        return f"keys of width {q.shape[-1]} are over {widest}, what the kernels hold in {q.dtype}"
    return None


def chunked(
    q: Float[Tensor, "b t h dk"],
    k: Float[Tensor, "b t h dk"],
    v: Float[Tensor, "b t h dv"],
    beta: Float[Tensor, "b t h"],
    g: Float[Tensor, "b t h"],
    state: Float[Tensor, "b h dk dv"] | None,
    scale: float,
) -> tuple[Float[Tensor, "b t h dv"], Float[Tensor, "b h dk dv"]]:
    """The matrix form in plain operators, in float32 or wider."""
    t, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    c = min(CHUNK, t)
    fill = -t % c  # tokens of beta = 0, g = 0 change nothing

    def chunks(x: Tensor) -> Tensor:
        x = F.pad(x.to(wide), (0, 0) * (x.ndim - 2) + (0, fill))
        return rearrange(x, "b (n c) h ... -> n b h c ...", c=c)

    queries, keys, values, step, fade = map(chunks, (q, k, v, beta, g))
    since = fade.cumsum(dim=-1)  # [n, b, h, c]
    # Masked before the exponential: above the diagonal it would overflow.
    earlier = torch.ones(c, c, dtype=torch.bool, device=q.device).tril()
    decay = (since[..., :, None] - since[..., None, :]).masked_fill(~earlier, -torch.inf).exp()

    system = step[..., None] * decay * (keys @ keys.mT)  # its diagonal is not looked at
    known = torch.cat([values, since.exp()[..., None] * keys], dim=-1) * step[..., None]
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    alone, of_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = decay * (queries @ keys.mT)
    queries = since.exp()[..., None] * queries
    keys = (since[..., -1:] - since).exp()[..., None] * keys

    memory = values.new_zeros(*keys.shape[1:3], k.shape[-1], v.shape[-1])
    memory, out = memory if state is None else state.to(wide), []
    for i in range(len(queries)):
        corrections = alone[i] - of_state[i] @ memory  # [b, h, c, dv]
        out.append(scale * (queries[i] @ memory + scores[i] @ corrections))
        memory = since[i, ..., -1, None, None].exp() * memory + keys[i].mT @ corrections
    together = rearrange(torch.stack(out), "n b h c dv -> b (n c) h dv")
    return together[:, :t].to(v.dtype), memory


def check(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor | None,
) -> None:
    """Refuse what contradicts itself, and on the CPU what would explode."""
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"{name}: q and k must be [b, t, h, dk] and v [b, t, h, dv], got {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)}"
        )
    b, t, h, dk = q.shape
    if t == 0:
        raise ValueError(f"{name}: there are no tokens")
    for what, x in (("beta", beta), ("g", g)):
        if x is not None and x.shape != (b, t, h):
            raise ValueError(f"{name}: {what} must be [b, t, h] = {[b, t, h]}, got {list(x.shape)}")
    wanted = (b, h, dk, v.shape[-1])
    if state is not None and state.shape != wanted:
        raise ValueError(
            f"{name}: state must be [b, h, dk, dv] = {list(wanted)}, got {list(state.shape)}"
        )
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        longest = k.detach().float().norm(dim=-1).max().item()
        if longest > 1.01:
            raise ValueError(
                f"{name}: the longest key has norm {longest:.3g}, expected at most 1: normalise k"
            )
        if g is not None and g.detach().max() > 0:
            raise ValueError(f"{name}: g reaches {g.max():.3g}, expected <= 0: a memory that grows")
