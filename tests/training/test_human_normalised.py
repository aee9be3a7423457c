"""Human-normalised returns: known cases, invariants, and published files where they are at hand."""

from __future__ import annotations

import json
import random as chance

import pytest

from tests.helpers import ROOT
from training.errors import UserError
from training.evaluation.human_normalised import human_normalised, interquartile_mean

PUBLISHED = ROOT.parent / "shared" / "data" / "rl_scores" / "rliable_atari100k"


def test_a_random_player_is_worth_nothing_and_a_person_one() -> None:
    low, high = {"a": -3.0, "b": 10.0, "c": 0.0}, {"a": 4.0, "b": 2.0, "c": 1.0}
    for given, worth, count in ((low, 0.0, 0), (high, 1.0, 3)):
        found = human_normalised({game: [given[game]] * 4 for game in given}, low, high)
        assert found == {"mean": worth, "median": worth, "iqm": worth, "superhuman": count}


def test_one_game_moves_the_mean_and_neither_median_nor_interquartile_mean() -> None:
    rng = chance.Random()
    low, high = dict.fromkeys("abcdefgh", 0.0), dict.fromkeys("abcdefgh", 2.0)
    plain = {game: [1.9 * rng.random() for _ in range(5)] for game in low}
    best = max(plain, key=lambda game: min(plain[game]))
    plain[best] = [1.95] * 5
    before = human_normalised(plain, low, high)
    after = human_normalised({**plain, best: [3000.0] * 5}, low, high)
    assert after["mean"] > before["mean"] + 100 and after["superhuman"] == 1
    assert (after["median"], after["iqm"]) == (before["median"], before["iqm"])


def test_the_middle_half_is_what_counts() -> None:
    assert interquartile_mean([9, 1, 2, -50, 3, 4, 5, 800]) == 3.5
    assert interquartile_mean([1.0, 5.0, 3.0]) == 3.0, "three have no quarter"
    with pytest.raises(UserError, match="no values"):
        interquartile_mean([])


def test_games_that_nobody_knows_and_missing_runs_are_refused() -> None:
    with pytest.raises(UserError, match=r"in \['Pitfall'\] are not known"):
        human_normalised({"Pitfall": [1.0]}, {"Pitfall": 0.0}, {})
    with pytest.raises(UserError, match="equally many runs"):
        human_normalised({"a": [1.0], "b": [1.0, 2.0]}, {"a": 0, "b": 0}, {"a": 1, "b": 1})
    with pytest.raises(UserError, match="0 games"):
        human_normalised({}, {}, {})


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published score files are not at hand")
def test_the_published_files_of_iris_give_the_published_table() -> None:
    """IRIS (2023, arXiv:2209.00588), table 1: mean 1.046, median 0.289, IQM 0.501, 10 games."""
    iris, low, high = (
        json.loads((PUBLISHED / f"{name}.json").read_text()) for name in ("IRIS", "RANDOM", "HUMAN")
    )
    low, high = ({game: run[0] for game, run in one.items()} for one in (low, high))
    found = human_normalised(iris, low, high)
    assert {key: round(value, 3) for key, value in found.items()} == {
        "mean": 1.046, "median": 0.289, "iqm": 0.501, "superhuman": 10,
    }  # fmt: skip
