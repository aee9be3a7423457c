"""One run: from a configuration to results. The only place where recipe, data and loop meet.

config -> processes and device -> data -> recipe -> loop.fit -> results.json, report
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from typing import Any

from training.distributed import Processes, initialise, shut_down
from training.errors import memory_errors
from training.logging import Logger
from training.loop import fit, out_of_budget
from training.protocols import Recipe
from training.recipes.config import RecipeConfig
from training.run_directory import RunDirectory, digest, plain, run_path
from training.schema import TrainConfig, identity
from training.seeding import seed_global_generators


def run(config: TrainConfig) -> dict[str, Any]:
    """Train and evaluate, or continue, or return what this configuration's finished run recorded.

    `recipe.name` is the stem of a file in training/recipes/ that offers FRAMEWORK ("torch" or
    "jax"), `build(config, processes, device)` and `estimate(config)`.

    Raises UserError for what the user can mend, RunStopped for a run that ended early.
    """
    if (done := finished(config)) is not None:
        return done
    module = recipe_module(config)
    processes, device = initialise(config.scale, module.FRAMEWORK)
    try:
        with RunDirectory(config, processes) as directory, memory_errors():
            seed_global_generators(config.seed)
            recipe = module.build(config, processes, device)
            return train(config, recipe, directory, processes)
    finally:
        shut_down(processes)


def recipe_module(config: TrainConfig) -> Any:
    """The file of training/recipes/ that the configuration names."""
    return importlib.import_module(f"training.recipes.{config.recipe.name}")


def read_weights(recipe: RecipeConfig) -> dict[str, str]:
    """Keys of the configuration that name weights -> hash of what they name."""
    keys = [item.name for item in dataclasses.fields(recipe) if item.metadata.get("weights")]
    found = {f"recipe.{key}": getattr(recipe, key) for key in keys}
    if not any(found.values()):
        return {}
    from training.pretrained import fingerprint

    return {key: fingerprint(value, key) for key, value in found.items() if value}


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """Results of this very configuration, if its run has finished.

    A run that a budget ended is finished only as long as the budget says so: with a larger one it
    goes on.
    """
    path = run_path(config)
    try:
        recorded = json.loads((path / "identity.json").read_text())
        results = json.loads((path / "results.json").read_text())
    except (OSError, ValueError):
        return None  # if something is wrong with the directory, opening it says what
    if recorded != plain(identity(config)):
        return None
    if results.get("stopped_by") == "budget":
        used = results[results["unit"]], results["train_s"]
        return results if out_of_budget(config.loop, *used) else None
    return results


def train(
    config: TrainConfig, recipe: Recipe, directory: RunDirectory, processes: Processes
) -> dict[str, Any]:
    """Fit, evaluate, record."""
    directory.claim()
    directory.bind("data", recipe.data.content_hash)
    for key, value in read_weights(config.recipe).items():
        directory.bind(key, value)
    name = f"{config.experiment or 'unnamed'}/{directory.path.name}"
    logger = Logger(config.logger, directory.path, name, digest(name)[:16], processes.is_main)
    directory.status("running", step=0)
    try:
        outcome = fit(recipe, recipe.data, config.loop, directory, logger, processes)
    finally:
        logger.close()
    recipe.export(directory.path)
    results = {
        "experiment": config.experiment,
        "run": directory.path.name,
        "scale": config.scale.name,
        "seed": config.seed,
        "steps": outcome.state.step,
        "unit": recipe.unit,
        recipe.unit: outcome.state.units,
        "stopped_by": outcome.stopped_by,
        "train_s": outcome.state.elapsed_s,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "metrics": outcome.metrics,
        **recipe.summary(),
    }
    directory.finish(results)
    if processes.is_main and config.report:
        from training.evaluation.report import write_run_report

        write_run_report(directory.path)
    return results
