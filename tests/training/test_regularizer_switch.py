"""`recipe.regularizer` is one switch for models of images, films, and what actions do."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import (
    SMALL_BATCH,
    SMALL_COLOURED_ROOMS,
    SMALL_FILM,
    SMALL_FILMS,
    SMALL_IMAGES,
    SMALL_ROOMS,
)
from training.config import compose
from training.distributed import Processes
from training.run import recipe_module

MODELS = {
    "lejepa": [*SMALL_IMAGES["lejepa"], *SMALL_BATCH],
    "ijepa": [*SMALL_IMAGES["ijepa"], *SMALL_BATCH],
    "jepa_video": [*SMALL_FILMS["rollout"], *SMALL_FILM],
    "jepa_video_masked": [*SMALL_FILMS["masked"], *SMALL_FILM],
    "lewm": SMALL_COLOURED_ROOMS,
    "jepa_planning": SMALL_ROOMS,
}
TERMS = {
    "none": {"pred"},
    "ema": {"pred"},
    "vicreg": {"pred", "std", "cov"},
    "sigreg": {"pred", "sigreg"},
    "vc_idm": {"pred", "std", "cov", "time", "idm"},
}
CASES = [(m, k) for m in MODELS for k in TERMS if k != "vc_idm" or m == "jepa_planning"]


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_one_switch_decides_the_terms_and_their_weights(model: str, kind: str) -> None:
    config = compose([*MODELS[model], f"recipe.regularizer={kind}"])
    assert config.recipe.name == model
    made = recipe_module(config).build(config, Processes(), torch.device("cpu"))
    metrics = made.step(made.data.batch(0))
    found = {name.removeprefix("train/"): float(v) for name, v in metrics.items()}
    every = set().union(*TERMS.values())
    assert found.keys() & every == TERMS[kind]
    weighted = sum(getattr(made.objective, f"{name}_weight") * found[name] for name in TERMS[kind])
    assert found["loss"] == pytest.approx(weighted, rel=1e-5)
