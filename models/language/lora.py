"""Low-rank changes of a decoder's weights: another place to put a document.

LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685:

    W x  ->  W x + (alpha / r) B A x        A [r, in] normal, B [out, r] zero at the start

Here of the four projections of attention, which makes the bytes of rank r equal to those of p rows
of keys and values wherever 2 kv hd p = r (sum of in + out of the four). The model's own weights are
not touched: the changed ones are made for a call.

Dimensions: b sequences, t tokens, d residual width, r rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from models.language.config import TransformerConfig
from models.language.transformer import Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Lora(nn.Module):
    """The factors of every target, by the name of its weight with `_` for `.`.

    Args:
        model: whose projections are changed; only their shapes are looked at.
        rank: r >= 1.
        alpha: scale of the change, relative to the rank.
    """

    def __init__(
        self,
        model: Transformer,
        rank: int,
        *,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        self.scale = 1.0 if alpha is None else alpha / rank
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in targets(model).items():
            out, into = weight.shape
            drawn = torch.randn(rank, into, generator=generator) * into**-0.5
            self.down[name.replace(".", "_")] = nn.Parameter(drawn.to(weight))
            self.up[name.replace(".", "_")] = nn.Parameter(weight.new_zeros(out, rank))

    def weights(self, model: Transformer) -> dict[str, Float[Tensor, "out in"]]:
        """Name -> changed weight."""
        return {
            name: weight
            + self.scale * self.up[name.replace(".", "_")] @ self.down[name.replace(".", "_")]
            for name, weight in targets(model).items()
        }

    def forward(
        self, model: Transformer, tokens: Int[Tensor, "b t"], **options
    ) -> Float[Tensor, "b t vocab"]:
        """Logits of the changed model; options as of `Transformer.forward`."""
        return functional_call(model, self.weights(model), (tokens,), options)

    @property
    def num_bytes(self) -> int:
        return sum(p.numel() * p.itemsize for p in self.parameters())


def targets(model: Transformer) -> dict[str, Tensor]:
    """Name -> weight of every projection of attention."""
    return {
        name: weight for name, weight in model.named_parameters() if name.split(".")[-2] in TARGETS
    }


def rank_for(config: TransformerConfig, rows: int) -> int:
    """The rank whose bytes come nearest to those of `rows` rows of keys and values, at least 1."""
    d, hd = config.d_model, config.resolved_head_dim
    query, key = config.num_heads * hd, config.resolved_kv_heads * hd
    of_rank = 2 * (d + query) + 2 * (d + key)
    return max(1, round(rows * 2 * key / of_rank))
