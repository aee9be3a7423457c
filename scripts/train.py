"""`afferent train experiment=<paper>/<name> [scale=cpu|h200|paper] [key=value ...]`

Composes the configuration, checks it, runs it: this file and training/run.py are the two hops to
the training step. Sweeps (`-m`, `sweep=...`) end with one table over their runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from training.config import (
    config_message,
    experiment_list,
    options,
    refuse_empty_groups,
    to_config,
)
from training.errors import UserError
from training.options import register
from training.run_directory import run_path
from training.schema import TrainConfig

GRACE = 20.0  # seconds that other processes leave the first one to speak
HELP = """afferent train experiment=<paper>/<name> [group=option ...] [key=value ...] [flags]

Runs one experiment; the same command again resumes it, or shows its results.

experiments:
{experiments}

groups: {groups}
flags:
  --dry-run            print the resolved configuration, parameters, FLOPs, memory; train nothing
  -m, --multirun       one run per combination of values: seed=0,1,2 optim.lr=1e-3,3e-3
  --cfg job            print the composed configuration
  --info defaults-tree show which file sets what
Every key with its meaning: training/schema.py, and the dataclasses that training/options.py names
"""


@hydra.main(config_path="pkg://configs", config_name="train", version_base="1.3")
def launch(cfg: DictConfig) -> None:
    """One run, in this process or wherever the launcher put it."""
    alone = HydraConfig.get().mode == RunMode.RUN
    try:
        launch_one(cfg, alone)
    except UserError as error:
        if not alone:
            raise  # Hydra says which of the sweep's combinations it was
        leave(error)


def leave(error: UserError) -> NoReturn:
    """Say it in one sentence and exit.

    torchrun ends all processes when one has ended: the others leave it to the first to speak, and
    do so themselves if they are still there after a while, as then it found nothing wrong.
    """
    if not is_first_process():
        time.sleep(GRACE)
    print(f"afferent: {error}", file=sys.stderr)
    exit_process(error.code)


def exit_process(code: int) -> NoReturn:
    """Exit; as one of several torch processes without tearing the interpreter down.

    Threads of a gloo group may hold the tensors of its last collective a moment longer, and abort
    the process if they want to release them while the interpreter goes away.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_first_process() -> bool:
    """Of those that torchrun or Slurm started; the others say nothing."""
    return os.environ.get("RANK", "0") == "0"


def launch_one(cfg: DictConfig, alone: bool) -> None:
    """Check the configuration; run it, or say what it would do."""
    choice = HydraConfig.get().runtime.choices.get("experiment")
    config = dataclasses.replace(to_config(cfg), experiment=choice)
    if not alone:
        register_in_sweep(config)
    if config.dry_run:
        from scripts.dry_run import print_dry_run

        print_dry_run(config)
        return
    from training.run import run

    show(config, run(config))


def show(config: TrainConfig, results: dict[str, Any]) -> None:
    """What a person wants to see at the end; the last line is the page's path."""
    if not is_first_process():
        return
    from training.evaluation.report import run_summary

    print(run_summary(results))
    page = run_path(config) / "report.html"
    print(page if page.exists() else run_path(config))


def register_in_sweep(config: TrainConfig) -> None:
    """Leave a note for the sweep's table: which run this combination of values is."""
    from training.files import write_json

    info = HydraConfig.get()
    directory = Path(info.sweep.dir)
    note = {
        "overrides": [o for o in info.overrides.task if not o.startswith("experiment=")],
        "path": str(run_path(config)),
    }
    for file in directory.glob("run_*.json"):
        other = json.loads(file.read_text())
        if other["path"] == note["path"] and other["overrides"] != note["overrides"]:
            raise UserError(
                f"{' '.join(other['overrides'])} and {' '.join(note['overrides'])} are the same "
                "run: what differs changes nothing that is computed, so it cannot be swept"
            )
    write_json(directory / f"run_{info.job.num:04d}.json", note)


def main() -> None:
    """Entry point: argument errors end with one sentence and exit code 2."""
    arguments = ["dry_run=true" if word == "--dry-run" else word for word in sys.argv[1:]]
    if any(word in ("-h", "--help") for word in arguments):
        groups = [f"{g}={'|'.join(options(g))}" for g in ("scale", "logger", "launcher", "sweep")]
        print(HELP.format(experiments=experiment_list(), groups="  ".join(groups)), end="")
        return
    asks = ("--cfg", "--info", "--hydra-help", "--version", "-sc", "--shell-completion")
    if not any(word.startswith("experiment=") or word.startswith(asks) for word in arguments):
        print(
            f"Which experiment? afferent train experiment=<one of>\n{experiment_list()}",
            file=sys.stderr,
        )
        sys.exit(2)
    # Flags may stand anywhere; argparse wants them before the overrides.
    sys.argv[1:] = sorted(arguments, key=lambda word: word not in ("-m", "--multirun"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises; the sentences below are ours
    os.environ.setdefault("AFFERENT_SWEEP", time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}")
    register()
    try:
        refuse_empty_groups(arguments)
        if "launcher=slurm" in arguments and shutil.which("srun") is None:
            raise UserError(
                "launcher=slurm needs Slurm, but there is no `srun` on this machine: use "
                "launcher=submitit_local to try the launch here, or launcher=joblib"
            )
        try:
            launch()
        finally:
            summarise_sweep()
    except UserError as error:
        leave(error)
    except (HydraException, OmegaConfBaseException) as error:
        print(f"afferent: {config_message(error)}", file=sys.stderr)
        sys.exit(2)
    exit_process(0)


def summarise_sweep() -> None:
    """One table and one plot over the runs of a sweep, if this was one."""
    root = Path(os.environ.get("AFFERENT_RUNS", "runs"))
    directory = root / "sweeps" / os.environ["AFFERENT_SWEEP"]
    if any(directory.glob("run_*.json")):
        from training.evaluation.sweep import write_sweep_summary

        print(write_sweep_summary(directory))


if __name__ == "__main__":
    main()
