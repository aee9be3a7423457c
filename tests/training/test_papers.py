"""The papers that ship: what their claims need can be run at scales that no machine here has."""

from __future__ import annotations

from importlib import import_module

import pytest

from training.evaluation.claims_file import load_claims, papers
from training.evaluation.launch import plan


@pytest.mark.parametrize("paper", papers())
def test_every_run_of_a_paper_is_one_that_its_recipe_takes_on_a_gpu(paper: str) -> None:
    claims = load_claims(paper)
    for run in plan(claims.at("h200"), "h200", seeds=1) if claims.needed("h200") else []:
        recipe = import_module(f"training.recipes.{run.config.recipe.name}")
        if hasattr(recipe, "check"):
            recipe.check(run.config)
