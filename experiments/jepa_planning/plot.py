"""Figures of planning in two rooms, from results/<scale>.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.evaluation.plots import dot_chart, final, line_chart, mean_curve, series_curves
from training.evaluation.room_figures import distance_maps, paths_chart
from training.files import write_atomic

POLICIES = {
    "true dynamics, latent distance": ("world", "true_dynamics_latent_cost"),
    "the model's plans": ("world", "model"),
    "weak time similarity": ("weak_time", "model"),
    "no time similarity": ("no_time", "model"),
    "true dynamics, straight distance": ("world", "true_dynamics"),
    "straight to the goal": ("world", "greedy"),
    "untrained": ("untrained", "model"),
    "collapsed": ("collapsed", "model"),
    "random": ("world", "random"),
}
RULES = {"block": "blocked by walls", "bounce": "bouncing off walls"}
SPECTRA = {"world": "vc_idm", "weak_time": "weak time similarity", "collapsed": "nothing"}
MAPS = {"world": "as trained", "no_time": "no time sim.", "untrained": "untrained"}


def figures(results: dict[str, Any], directory: Path) -> None:
    """Write <scale>_success_<rule>, <scale>_paths, _distances, _spectrum and _ahead .svg."""
    runs, scale = results["runs"], results["scale"]
    for rule, means in RULES.items():
        groups = {
            name: values
            for name, (run, policy) in POLICIES.items()
            if (values := final(runs, run, f"eval/{rule}/{policy}"))
        }
        if groups:
            chart = dot_chart(groups, f"share of goals reached, {means}")
            write_atomic(directory / f"{scale}_success_{rule}.svg", chart)
    series = runs.get("world", {}).get("series", [])
    if series:
        keys = {means: f"paths/{rule}/model" for rule, means in RULES.items()}
        known = {name: key for name, key in keys.items() if key in series[0]}
        write_atomic(directory / f"{scale}_paths.svg", paths_chart(series[0], known))
        curves = [seed["px_ahead"] for seed in series]
        steps = range(1, len(curves[0]) + 1)
        lines = [mean_curve("read off predicted latents", steps, curves)]
        chart = line_chart(lines, "error of the dot's place in pixels", "predicted steps")
        write_atomic(directory / f"{scale}_ahead.svg", chart)
    maps = {
        name: seeds[0]
        for run, name in MAPS.items()
        if (seeds := runs.get(run, {}).get("series")) and "distance/map" in seeds[0]
    }
    if maps:
        write_atomic(directory / f"{scale}_distances.svg", distances(maps))
    spectra = series_curves(runs, SPECTRA, "spectrum")
    if spectra:
        chart = line_chart(spectra, "standard deviation of latents", "principal axis")
        write_atomic(directory / f"{scale}_spectrum.svg", chart)


def distances(maps: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """How far the first seed's first goal is from everywhere, by each model."""
    goals, rooms, flat = (
        np.array([series[f"distance/{key}"] for series in maps.values()])
        for key in ("goal", "room", "map")
    )
    side = math.isqrt(flat.shape[1])
    return distance_maps(flat.reshape(-1, side, side), goals, rooms, list(maps))
