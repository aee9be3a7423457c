"""What can be read off latents: probes that are fitted to frozen latents and judged on others.

Probes see numbers, never the encoder: nothing flows back. A linear probe says what is there in the
open, an MLP what is there at all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Probe = Callable[[Float[Tensor, "... d"]], Float[Tensor, "... k"]]


def linear_probe(z: Float[Tensor, "n d"], y: Float[Tensor, "n k"], ridge: float = 1e-4) -> Probe:
    """Least squares with an intercept; `ridge` is relative to the latents' mean variance."""
    z, y = z.detach().double(), y.double()
    mean, middle = z.mean(dim=0), y.mean(dim=0)
    gram = (z - mean).mT @ (z - mean)
    penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram + penalty * eye, (z - mean).mT @ (y - middle))
    return lambda x: ((x.double() - mean) @ weight + middle).float()


def mlp_probe(
    z: Float[Tensor, "n d"],
    y: Float[Tensor, "n k"],
    generator: torch.Generator,
    width: int = 256,
    steps: int = 600,
    batch: int = 256,
) -> Probe:
    """Two hidden layers, fitted by Adam."""
    z, y = z.detach().float(), y.float()
    scale_z, scale_y = (x.std(dim=0).clamp(min=1e-6) for x in (z, y))
    mean_z, mean_y = z.mean(dim=0), y.mean(dim=0)
    widths = [z.shape[1], width, width, y.shape[1]]
    weights = [
        torch.randn(b, a, generator=generator, device=z.device) * (2 / a) ** 0.5
        for a, b in pairwise(widths)
    ]
    biases = [torch.zeros(b, device=z.device) for b in widths[1:]]
    parameters = [p.requires_grad_() for p in (*weights, *biases)]

    def apply(x: Tensor) -> Tensor:
        x = (x - mean_z) / scale_z
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = F.linear(x, weight, bias)
            x = x if i == len(weights) - 1 else F.relu(x)
        return x

    optimiser = torch.optim.Adam(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    wanted = (y - mean_y) / scale_y
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(z), (batch,), generator=generator, device=z.device)
            loss = (apply(z[rows]) - wanted[rows]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return lambda x: apply(x.float()) * scale_y + mean_y


def logistic_probe(
    z: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, decay: float = 1e-3
) -> Probe:
    """Multinomial logistic regression on standardised latents: the logits of each class.

    Args:
        decay: weight of half the squared coefficients, beside the mean of the losses.
    """
    z = z.detach().float()
    mean, scale = z.mean(dim=0), z.std(dim=0).clamp(min=1e-6)
    x = (z - mean) / scale
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    fitted, offset = weight.detach(), bias.detach()
    return lambda z: ((z.float() - mean) / scale) @ fitted + offset


def accuracy(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> float:
    """Share of rows whose largest logit is the right one."""
    return (logits.argmax(dim=-1) == labels).float().mean().item()


def nearest_accuracy(
    known: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    asked: Float[Tensor, "m d"],
    truth: Int[Tensor, " m"],
) -> float:
    """Share of rows whose most alike known row, by the cosine, is of their class."""
    a, b = F.normalize(asked.float(), dim=-1), F.normalize(known.float(), dim=-1)
    nearest = torch.cat([(part @ b.mT).argmax(dim=-1) for part in a.split(1024)])
    return (labels[nearest] == truth).float().mean().item()


def r_squared(told: Float[Tensor, "n k"], truth: Float[Tensor, "n k"]) -> float:
    """Share of the variance that is explained, over all components; negative if worse than none."""
    error = (told - truth).square().sum()
    return (1 - error / (truth - truth.mean(dim=0)).square().sum()).item()


def distance_rms(told: Float[Tensor, "... k"], truth: Float[Tensor, "... k"]) -> float:
    """Root mean square of the distance between two points."""
    return (told - truth).square().sum(-1).mean().sqrt().item()


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Correlation of ranks; nan where one of them is constant."""
    ranks = [x.argsort().argsort().double() for x in (a, b)]
    if any(x.min() == x.max() for x in (a, b)):
        return float("nan")
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
