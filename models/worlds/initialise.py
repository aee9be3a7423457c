"""Initial weights of convolutions, linear layers, recurrent cells and norms, from one generator."""

from __future__ import annotations

import torch
from torch import nn

NORMS = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d


@torch.no_grad()
def init_zero(*modules: nn.Module) -> None:
    """Every weight and bias in the modules 0."""
    for module in modules:
        for parameter in module.parameters():
            parameter.zero_()


@torch.no_grad()
def init_uniform(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Weights and biases uniform within 1 / sqrt(fan-in), norms as the identity.

    The bounds are torch's own, but drawn from `generator`; every parameter is set. What a module
    holds besides layers (a class token) it sets itself, in `init_own(generator)`.
    """
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if not own:
            continue
        if callable(own_values := getattr(part, "init_own", None)):
            own_values(generator)
            continue
        if isinstance(part, nn.Linear | nn.Conv2d):
            bound = part.weight[0].numel() ** -0.5
        elif isinstance(part, nn.Embedding):
            part.weight.normal_(0.0, 0.02, generator=generator)
            continue
        elif isinstance(part, nn.GRUCell):
            bound = part.hidden_size**-0.5
        elif isinstance(part, NORMS):
            part.reset_parameters()
            continue
        else:
            raise TypeError(f"no initial values are known for a {type(part).__name__}")
        for parameter in own:
            parameter.uniform_(-bound, bound, generator=generator)
