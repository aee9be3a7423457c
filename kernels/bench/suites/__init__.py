"""The suites: for each op, the problems it is timed on."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from kernels.bench.cases import Case, Setting


def cases(suite: str, setting: Setting) -> Iterator[Case]:
    """The cases of a suite, the most telling first; targets are for the shapes of scale h200."""
    for case in importlib.import_module(f"kernels.bench.suites.{suite}").cases(setting):
        yield case if setting.scale == "h200" else replace(case, targets=())


def select(suites: Sequence[str], part: str, setting: Setting) -> Iterator[Case]:
    """The cases of `suites` whose id has `part` in it; those that are extra after all others."""
    found = [case for suite in suites for case in cases(suite, setting) if part in case.id]
    yield from sorted(found, key=lambda case: case.extra)
