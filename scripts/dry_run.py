"""`--dry-run`: the resolved configuration, sizes and cost of a run that is not started."""

from __future__ import annotations

from omegaconf import OmegaConf

from training.logging import human
from training.profiling import PEAK_BF16_FLOPS
from training.run import recipe_module
from training.run_directory import plain, run_path
from training.schema import TrainConfig


def print_dry_run(config: TrainConfig) -> None:
    """Print what `config` would run and cost. Raises UserError where it cannot be built."""
    estimate = recipe_module(config).estimate(config)
    total = sum(estimate.memory.values())
    flops = estimate.flops_per_step * config.loop.steps
    parts = ", ".join(f"{name} {human(size)}B" for name, size in estimate.memory.items())
    hours = flops / (0.4 * PEAK_BF16_FLOPS["H200"]) / 3600
    print(OmegaConf.to_yaml(plain(config)))
    print(f"run directory    {run_path(config)}")
    print(f"parameters       {estimate.parameters:,}")
    print(f"steps            {config.loop.steps:,}")
    print(f"{estimate.unit + ' per step':<16} {estimate.units_per_step:,}")
    print(f"FLOPs per step   {human(estimate.flops_per_step)}")
    print(f"FLOPs in all     {human(flops)} ({hours:.3g} h of one H200 at 40 % of its bf16 peak)")
    print(f"memory           {human(total)}B per process: {parts}")
    print("dry run: nothing was trained")
