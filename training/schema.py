"""The schema of what every run has: types, defaults, units, one line of meaning each.

What its groups may be is in options.py; what each of those has, beside the code that it is for.

YAML under configs/ holds values only; what a value may be is decided here, in `__post_init__`.
Importing this file loads no framework. Fields marked `free` may differ when a run is resumed: they
do not change what is computed, so they are no part of a run's identity.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from models.config import ModelConfig
from training.data.config import DataConfig
from training.fields import above, at_least, free, within
from training.recipes.config import RecipeConfig


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Optimiser(StrEnum):
    adamw = "adamw"
    muon = "muon"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"
    exponential = "exponential"


class WandbMode(StrEnum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class OptimConfig:
    """Optimiser, schedule, clipping, accumulation, weight averaging."""

    name: Optimiser = Optimiser.adamw
    "adamw for every parameter, or muon for the matrices inside blocks and adamw for the rest."
    lr: float = 1e-3
    "Peak learning rate of AdamW."
    muon_lr: float = 0.02
    "Peak learning rate of Muon."
    beta1: float = 0.9
    "AdamW's decay of the first moment."
    beta2: float = 0.95
    "AdamW's decay of the second moment."
    momentum: float = 0.95
    "Muon's momentum (Nesterov)."
    weight_decay: float = 0.0
    "Decoupled weight decay, on matrices only."
    schedule: Schedule = Schedule.cosine
    "Shape of the learning rate after the warm-up; wsd is constant, then linear to the end."
    warmup_steps: int = 0
    "Steps of linear warm-up."
    decay_fraction: float = 0.3
    "Last part of the run over which wsd decays."
    final_lr_ratio: float = 0.0
    "Learning rate at the last step, relative to the peak."
    restart: float = 0.0
    "Share of the run after which the schedule begins anew, for recipes of two parts; 0: never."
    clip_norm: float | None = 1.0
    "Largest global gradient norm; null for no clipping."
    accumulate: int = 1
    "Micro-batches per optimiser step; divides the batch of each process."
    ema_decay: float | None = None
    "Decay per step of the averaged weights that are evaluated; null evaluates the weights."

    def __post_init__(self) -> None:
        above(self, "optim", 0, "lr", "muon_lr", "clip_norm")
        within(self, "optim", 0.0, 0.999999, "beta1", "beta2", "momentum", "ema_decay")
        within(self, "optim", 0.0, 1.0, "decay_fraction", "final_lr_ratio", "restart")
        at_least(self, "optim", 0, "warmup_steps", "weight_decay")
        at_least(self, "optim", 1, "accumulate")


@dataclass
class LoopConfig:
    """How long a run is and how often it logs, evaluates and saves."""

    steps: int = 1000
    "Optimiser steps of the run; the schedule ends here."
    max_units: int | None = free(None)
    "Stop after this many units of experience (tokens, frames, environment steps); null for none."
    time_limit_s: float | None = free(None)
    "Stop after this many seconds of training, resumed parts included; null for none."
    log_every: int = 10
    "Steps between rows of metrics.jsonl; each row averages the steps since the last."
    eval_every: int = 0
    "Steps between evaluations; 0 evaluates only at the end."
    checkpoint_every: int = free(100)
    "Steps between checkpoints; 0 saves only at the end."
    keep_checkpoints: int = free(2)
    "Newest checkpoints that are kept."
    profile_steps: list[int] = field(default_factory=list, metadata={"free": True})
    "[first, last] step to trace into figures/trace.json; [] for none."

    def __post_init__(self) -> None:
        at_least(self, "loop", 1, "steps", "log_every", "keep_checkpoints", "max_units")
        at_least(self, "loop", 0, "eval_every", "checkpoint_every", "time_limit_s")
        traced = self.profile_steps
        if traced and not (len(traced) == 2 and 0 <= traced[0] <= traced[1]):
            raise ValueError(f"loop.profile_steps={traced} must be [first, last] or []")


@dataclass
class ScaleConfig:
    """Facts about the machine: nothing about the experiment."""

    name: str = "cpu"
    "Which scale this is: cpu, h200 or paper; picks the sizes under configs/experiment_scale/."
    device: Device = Device.auto
    "auto takes a GPU where there is one."
    devices: int | None = free(None)
    "Devices the run must have, one process each for torch; null takes what is there."
    replicas: int = free(1)
    "Groups of processes that each hold the whole state (hybrid sharding); divides the processes."
    precision: Precision = Precision.fp32
    "Arithmetic of forward and backward; parameters and optimiser state stay fp32."
    compile: bool = False
    "torch.compile a language model's blocks; no other torch recipe has any (jax compiles all)."
    deterministic: bool = False
    "Refuse operations whose result depends on scheduling (slower on a GPU)."
    threads: int | None = free(None)
    "CPU threads per process; null leaves the library's choice."

    def __post_init__(self) -> None:
        at_least(self, "scale", 1, "devices", "replicas")
        within(self, "scale", 1, 1024, "threads")


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.jsonl and the progress line."""

    wandb: WandbMode = WandbMode.disabled
    "offline writes files for a later `wandb sync`; online needs an account; disabled writes none."
    project: str = "afferent"
    "wandb project."
    tensorboard: bool = False
    "Also write tensorboard event files into the run directory."


@dataclass
class TrainConfig:
    """One run. The groups are picked by `experiment=` and specialised by `scale=`."""

    experiment: str | None = None
    "Which experiment: a file below configs/experiment/, without its ending."
    run: str | None = free(None)
    "Name of the run's directory; null derives it from the scale, the seed and the configuration."
    runs_dir: str = free("${oc.env:AFFERENT_RUNS,runs}")
    "Where runs are written: <runs_dir>/<experiment>/<run>/."
    seed: int = 0
    "Every random stream of the run derives from it."
    dry_run: bool = free(False)
    "Print the resolved configuration, sizes and cost; train nothing."
    report: bool = free(True)
    "Write the static report page at the end."
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    "The objective."
    model: ModelConfig = field(default_factory=ModelConfig)
    "What is trained."
    data: DataConfig = field(default_factory=DataConfig)
    "What it is trained on."
    optim: OptimConfig = field(default_factory=OptimConfig)
    "How it is optimised."
    loop: LoopConfig = field(default_factory=LoopConfig)
    "How long, and how often it logs, evaluates and saves."
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    "The machine."
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(), metadata={"free": True})
    "Where metrics go."

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")
        for key in ("run", "experiment"):
            parts = str(getattr(self, key) or "").split("/")
            if {".", ".."} & set(parts) or (key == "run" and len(parts) > 1):
                raise ValueError(f"{key}={getattr(self, key)!r} must be a plain name")


def identity(config: Any) -> dict[str, Any]:
    """The part of a configuration that decides what is computed: all but the free fields."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        if item.metadata.get("free"):
            continue
        value = getattr(config, item.name)
        found[item.name] = identity(value) if dataclasses.is_dataclass(value) else value
    return found
