"""Is the encoder collapsing, and how? Numbers to log while it trains, and what they say.

    std              of each feature: near 0 where everything is one point
    rank             exp of the entropy of the normalised singular values (RankMe, 2023,
                     arXiv:2210.02885), of the latents as they are and of the centred ones: noise
                     around one point looks full-rank once it is centred, so neither will do alone
    participation    (sum of eigenvalues)^2 / sum of their squares, of the covariance
    correlation      mean absolute correlation of different features
    shift            length of the mean latent over that of the standard deviations: large around
                     one point
    sigreg           how far from a standard normal distribution, whatever the model is trained with
                     (sigreg.py, without the factor N): 1.05 / N where they are normal, 0.40 where
                     all are 0
    action use       prediction error with shuffled actions over that with the right ones: 1 where
                     the predictor ignores what was done

Ranks and spreads are from a covariance matrix: singular values of thousands of rows are slow on
a CPU. It is summed in fp64: one of fp32 shows ranks that its own rounding has made.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from models.worlds.jepa.sigreg import directions, sigreg

DEAD, NARROW, IGNORED = 0.05, 3.0, 1.5
ROWS, DIRECTIONS = 4096, 64  # that the statistic of SIGReg looks at


@torch.no_grad()
def diagnose(z: Float[Tensor, "n d"]) -> dict[str, float]:
    """The numbers above, of n latents."""
    z = z.detach().float()
    mean = z.mean(dim=0)
    centred = (z - mean).double()
    covariance = centred.mT @ centred / max(1, len(z) - 1)
    std = covariance.diagonal().clamp(min=0).sqrt()
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    raw = torch.linalg.eigvalsh(z.double().mT @ z.double()).clamp(min=0)
    apart = covariance / (std[:, None] * std).clamp(min=1e-12)
    d = z.shape[1]
    off = (apart.abs().sum() - apart.diagonal().abs().sum()) / max(1, d * (d - 1))
    some = z[:: -(-len(z) // ROWS)]
    axes = directions(d, DIRECTIONS, torch.Generator(z.device).manual_seed(0), z.device)
    return {
        "std": std.mean().item(),
        "std_least": std.min().item(),
        "rank": rank_me(raw.sqrt()),
        "rank_centred": rank_me(values.sqrt()),
        "participation": (values.sum() ** 2 / values.square().sum().clamp(min=1e-30)).item(),
        "correlation": off.item(),
        "shift": mean.norm().item() / max(std.norm().item(), 1e-12),
        "sigreg": sigreg(some, axes, scale_by_n=False).item(),
    }


def rank_me(singular_values: Float[Tensor, " d"]) -> float:
    """exp(entropy) of singular values that are normalised to sum 1; 0 of no spread at all."""
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    share = singular_values / total + 1e-12
    return torch.exp(-(share * share.log()).sum()).item()


def spectrum(z: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Standard deviations along the principal axes, the largest first."""
    z = z.detach().double()
    z = z - z.mean(dim=0)
    values = torch.linalg.eigvalsh(z.mT @ z / max(1, len(z) - 1))
    return values.clamp(min=0).sqrt().flip(0)


def alarm(found: dict[str, float]) -> str | None:
    """What is wrong and what it is most likely from; None where nothing is."""
    if found["std"] < DEAD:
        return (
            f"collapse: the features' standard deviation is {found['std']:.3g}, all images are "
            "one point. Nothing holds them apart, or too weakly beside the prediction: choose "
            "recipe.regularizer=vicreg or sigreg, or raise its weight"
        )
    if min(found["rank"], found["rank_centred"]) < NARROW:
        rank = min(found["rank"], found["rank_centred"])
        return (
            f"dimensional collapse: the latents have an effective rank of {rank:.1f}. Features "
            "repeat each other: raise recipe.cov_weight or recipe.sigreg_weight"
        )
    if found.get("action_use", IGNORED) < IGNORED:
        return (
            f"actions are ignored: wrong ones raise the error {found['action_use']:.2f} times "
            "only. What is predicted hardly depends on them: raise recipe.idm_weight, or predict "
            "more steps"
        )
    return None
