"""Cartridges: a small key/value cache, trained to stand for a long document.

Cartridges: Lightweight and general-purpose long context representations via self-study, 2025,
arXiv:2506.06266. The model stays as it is; per layer, p rows of keys and values are its parameters:

    Z = (k_0, v_0), (k_1, v_1), ..., (k_{p-1}, v_{p-1})        of each layer, k after the rotation
        frozen: an    trained by Adam
        attention sink

    logits of x_1, x_2, ... given Z: as if p tokens stood before them, so x_1 is at position p

That is prefix tuning (Li and Liang, 2021, arXiv:2101.00190) of the cache itself. With the keys and
values of the whole document as rows, and no step taken, it is in-context learning exactly; with p
rows it takes the memory of p tokens, so it compares with what presses keep of a cache.

Rows start as those of the document's first tokens, of tokens sampled from it, of another text, or
as random vectors; `training/recipes/cartridges.py` trains them, `cartridges_file.py` stores them.

Dimensions: p rows, kv key/value heads, hd head width; * documents that are trained side by side.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn

from models.language.prefix import Prefix, join, read
from models.language.transformer import Transformer

NAMES = ("keys", "values")


class CartridgeRows(nn.Module):
    """The rows as parameters.

    Args:
        start: of each layer [*, p, kv, hd]; copied.
        frozen: first rows that are not trained; training the attention sink destabilises.
    """

    def __init__(self, start: Prefix, frozen: int = 1) -> None:
        super().__init__()
        if not 0 <= frozen < start.rows:
            raise ValueError(f"frozen={frozen} must leave some of the {start.rows} rows to train")
        self.position = start.position
        self.keys, self.values = nn.ParameterList(), nn.ParameterList()
        for i, layer in enumerate(start.layers):
            for name, rows, x in zip(NAMES, (self.keys, self.values), layer, strict=True):
                self.register_buffer(f"sink_{name}_{i}", x[..., :frozen, :, :].detach().clone())
                rows.append(nn.Parameter(x[..., frozen:, :, :].detach().clone()))

    def forward(self) -> Prefix:
        """The rows as the prefix that a model takes."""
        layers = tuple(
            (self._whole("keys", i, k), self._whole("values", i, v))
            for i, (k, v) in enumerate(zip(self.keys, self.values, strict=True))
        )
        return Prefix(layers, self.position)

    def _whole(self, name: str, layer: int, trained: Tensor) -> Tensor:
        return torch.cat([self.get_buffer(f"sink_{name}_{layer}"), trained], dim=-3)


@torch.no_grad()
def first_tokens(model: Transformer, tokens: Int[Tensor, "b t"], rows: int) -> Prefix:
    """Keys and values of the first `rows` tokens, [b, rows, kv, hd]."""
    if not 1 <= rows <= tokens.shape[1]:
        raise ValueError(
            f"{rows} rows cannot start from the first of {tokens.shape[1]} tokens: the text is too "
            "short"
        )
    return read(model, tokens[:, :rows]).prefix()


@torch.no_grad()
def sampled_chunks(
    model: Transformer,
    tokens: Int[Tensor, "b t"],
    rows: int,
    generator: torch.Generator,
    chunk: int = 8,
) -> Prefix:
    """Keys and values of the first token and of chunks from all over the text, read as one text.

    (Learned structure in Cartridges, 2025, arXiv:2508.17032: converges faster than the first
    tokens.) The chunks keep their order.
    """
    t = tokens.shape[1]
    if not 1 <= rows <= t:
        raise ValueError(f"{rows} rows cannot be sampled from {t} tokens: the text is too short")
    starts = torch.arange(1, t, chunk)
    needed = -(-(rows - 1) // chunk)
    chosen = starts[torch.randperm(len(starts), generator=generator)[:needed].sort().values]
    index = (chosen[:, None] + torch.arange(chunk)).flatten()
    index = torch.cat([torch.zeros(1, dtype=torch.long), index[index < t]])
    rest = torch.tensor([i for i in range(t) if i not in set(index.tolist())], dtype=torch.long)
    index = torch.cat([index, rest])[:rows].sort().values  # the last chunk may be a short one
    return read(model, tokens[:, index.to(tokens.device)]).prefix()


@torch.no_grad()
def random_vectors(
    model: Transformer, first: Int[Tensor, "b 1"], rows: int, generator: torch.Generator
) -> Prefix:
    """Normal vectors of variance one behind the sink, which is the first token's row."""
    sink = read(model, first).prefix()

    def rows_like(x: Tensor) -> Tensor:
        shape = (x.shape[0], rows - 1, *x.shape[2:])
        drawn = torch.randn(shape, generator=generator).to(x)
        return torch.cat([x, drawn], dim=1)

    return Prefix(sink.map(rows_like).layers, rows)


def compose(cartridges: list[Prefix], *, apart: bool = False) -> Prefix:
    """Several cartridges one after the other, without further training, every row at its position.

    Args:
        apart: the first token stands after as many positions as they have together, as in the
            server that the authors publish. False: after the longest of them, so that each has it
            where it was trained to have it.
    """
    positions = [cartridge.position for cartridge in cartridges]
    return join(cartridges, sum(positions) if apart else max(positions))
