"""Every experiment's resolved configuration, per scale, as reviewed: defaults cannot drift unseen.

`pytest tests/test_golden_configs.py --update-golden` rewrites the files on purpose.
"""

from __future__ import annotations

import difflib

import pytest
from omegaconf import OmegaConf

from tests.helpers import ROOT
from training.config import compose, experiments, options
from training.run_directory import plain

GOLDEN = ROOT / "tests" / "golden"
CASES = [(name, scale) for name in experiments() for scale in options("scale")]


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_resolved_configuration_is_the_reviewed_one(
    name: str, scale: str, update_golden: bool, monkeypatch
) -> None:
    monkeypatch.delenv("AFFERENT_RUNS", raising=False)
    monkeypatch.delenv("AFFERENT_CACHE", raising=False)
    now = OmegaConf.to_yaml(plain(compose([f"experiment={name}", f"scale={scale}"])))
    file = GOLDEN / name / f"{scale}.yaml"
    if update_golden:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(now)
    assert file.exists(), f"{file} is missing: run pytest with --update-golden and review it"
    changes = list(difflib.unified_diff(file.read_text().splitlines(), now.splitlines(), n=0))
    assert not changes, "\n".join(changes)


def test_no_golden_file_is_left_behind() -> None:
    known = {GOLDEN / name / f"{scale}.yaml" for name, scale in CASES}
    assert {*GOLDEN.rglob("*.yaml")} <= known
