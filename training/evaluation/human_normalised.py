"""What an agent's returns are worth over many games, in shares of a person's.

    HNS = (return - random) / (human - random)        of each game and run

The mean and the median are of games' means over runs; the interquartile mean is that of the middle
half of all runs of all games, as in rliable (Deep Reinforcement Learning at the Edge of the
Statistical Precipice, 2021, arXiv:2108.13264). Which agent is the better one can depend on which of
them is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from training.errors import UserError

ROUNDING = 1e-9  # of shares


def human_normalised(
    returns: Mapping[str, Sequence[float]],
    random: Mapping[str, float],
    human: Mapping[str, float],
) -> dict[str, float]:
    """mean, median, iqm, and how many games' means are a person's or more (`superhuman`).

    Args:
        returns: of each game, one of each run; all games have as many.
        random, human: return of a random player and of a person, by game.

    Raises:
        UserError: no games, games of which one of the two is not known, or of unlike many runs.
    """
    unknown = sorted(game for game in returns if game not in random or game not in human)
    if unknown:
        raise UserError(f"the returns of a random player or of a person in {unknown} are not known")
    if not returns or len({len(runs) for runs in returns.values()}) != 1:
        raise UserError(f"{len(returns)} games must be one or more, with equally many runs")
    shares = {
        game: [(value - random[game]) / (human[game] - random[game]) for value in runs]
        for game, runs in returns.items()
    }
    means = [fmean(runs) for runs in shares.values()]
    return {
        "mean": fmean(means),
        "median": median(means),
        "iqm": interquartile_mean([value for runs in shares.values() for value in runs]),
        "superhuman": float(sum(share >= 1 - ROUNDING for share in means)),
    }


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of those that are left without the lowest and the highest quarter, rounded down."""
    if not values:
        raise UserError("the interquartile mean of no values is not defined")
    cut = len(values) // 4
    return fmean(sorted(values)[cut : len(values) - cut])
