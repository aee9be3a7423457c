"""Where a run's numbers go.

    metrics.jsonl   what was learned: a function of the configuration alone, bitwise repeatable
    perf.jsonl      how fast: units per second, step time, memory, utilisation
    the terminal    one line: step, loss, rate, memory, time left
    wandb, tensorboard   by configuration, into the run directory; never a login, never a network
                         unless logger.wandb=online asks for it

Keys are `train/...`, `eval/...`, `opt/...`, `perf/...`, each with its unit in its name where it
has one.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from training.errors import UserError
from training.files import write_atomic, writing
from training.schema import LoggerConfig, WandbMode

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a .jsonl file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        rows.append(json.loads(line))
    return rows


class JsonlFile:
    """Appends rows; `rewind` drops what a resumed run will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None

    def rewind(self, step: int, rows: int | None = None) -> None:
        """Keep only the first `rows` rows, or those up to and including `step`."""
        self.close()
        if self.path.exists():
            kept = read_rows(self.path)[:rows]
            kept = [row for row in kept if row["step"] <= step]
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: Row) -> None:
        with writing(self.path):
            if self.file is None:
                self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def sync(self) -> None:
        if self.file is not None:
            with writing(self.path):
                os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # what could not be written has been said by `write`
                self.file.close()
            self.file = None


class WandbSink:
    """wandb, offline unless asked; the identifier comes from the run, so a resume continues it."""

    def __init__(self, config: LoggerConfig, directory: Path, name: str, run_id: str) -> None:
        if config.wandb == WandbMode.online and not has_wandb_key():
            raise UserError(
                "logger.wandb=online needs an API key: set WANDB_API_KEY, or use "
                "logger.wandb=offline and `wandb sync` later"
            )
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self.run = wandb.init(
            mode=config.wandb.value,
            project=config.project,
            name=name,
            id=run_id,
            resume="allow" if config.wandb == WandbMode.online else None,
            dir=str(directory),
            settings=wandb.Settings(disable_git=True, console="off", x_disable_stats=True),
        )

    def write(self, row: Row) -> None:
        self.run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        self.run.finish()


def has_wandb_key() -> bool:
    """Whether wandb can log in without asking anybody."""
    netrc = Path.home() / ".netrc"
    return "WANDB_API_KEY" in os.environ or (
        netrc.exists() and "api.wandb.ai" in netrc.read_text(errors="replace")
    )


class TensorboardSink:
    """tensorboard event files below the run directory."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logger.tensorboard=true needs the package tensorboard: pip install tensorboard"
            ) from error
        self.open = partial(SummaryWriter, str(directory / "tensorboard"))
        self.writer: Any = None

    def write(self, row: Row) -> None:
        if self.writer is None:  # what a killed run wrote beyond its checkpoint is purged
            self.writer = self.open(purge_step=row["step"])
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self.writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Logger:
    """Every sink of one run. Only the main process writes."""

    def __init__(
        self, config: LoggerConfig, directory: Path, name: str, run_id: str, is_main: bool = True
    ) -> None:
        self.is_main = is_main
        self.rows = 0
        self.metrics = JsonlFile(directory / "metrics.jsonl")
        self.perf = JsonlFile(directory / "perf.jsonl")
        self.progress = Progress()
        self.sinks: list[Any] = []
        if is_main and config.wandb != WandbMode.disabled:
            self.sinks.append(WandbSink(config, directory, name, run_id))
        if is_main and config.tensorboard:
            self.sinks.append(TensorboardSink(directory))

    def rewind(self, step: int, rows: int) -> None:
        """Forget what was written after the checkpoint of `step`, which saw `rows` metric rows."""
        self.rows = rows
        if self.is_main:
            self.metrics.rewind(step, rows)
            self.perf.rewind(step)

    def log(self, step: int, metrics: Mapping[str, float], perf: Mapping[str, float]) -> None:
        """One row of each file, and of every sink. Non-finite values are written as null."""
        if not self.is_main or not metrics:
            return
        self.rows += 1
        clean = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self.metrics.write({"step": step, **clean})
        if perf:
            self.perf.write({"step": step, **perf})
        for sink in self.sinks:
            sink.write({"step": step, **clean, **perf})

    def sync(self) -> None:
        self.metrics.sync()

    def close(self) -> None:
        self.progress.close()
        for file in (self.metrics, self.perf):
            file.close()
        for sink in self.sinks:
            sink.close()


class Progress:
    """One line about where the run is: rewritten in place on a terminal, else every few seconds."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0) -> None:
        self.stream = stream or sys.stderr
        self.tty = self.stream.isatty()
        self.every_s = 0.1 if self.tty else every_s
        self.last = -math.inf
        self.width = 0

    def show(self, text: str, final: bool = False) -> None:
        now = time.monotonic()
        if now - self.last < self.every_s and not final:
            return
        self.last = now
        if self.tty:
            print("\r" + text.ljust(self.width), end="", file=self.stream, flush=True)
            self.width = len(text)
        else:
            print(text, file=self.stream, flush=True)

    def message(self, text: str) -> None:
        """A line that stays."""
        self.close()
        self.stream.write(text + "\n")  # at once: threads may share the stream
        self.stream.flush()

    def close(self) -> None:
        if self.tty and self.width:
            print(file=self.stream, flush=True)
            self.width = 0


def progress_line(
    step: int, steps: int, metrics: Mapping[str, float], perf: Mapping[str, float], unit: str
) -> str:
    """`step 120/450 | loss 2.31 | lr 1.0 | 9.1k tokens/s | 0.8 GB | 2:10 left`."""
    parts = [f"step {step}/{steps}"]
    parts += [
        f"{key.rpartition('/')[2]} {metrics[key]:.4g}"
        for key in ("train/loss", "train/return", "opt/grad_norm", "opt/lr")
        if key in metrics
    ]
    if rate := perf.get(f"perf/{unit}_per_s"):
        parts.append(f"{human(rate)} {unit}/s")
    if "perf/mfu" in perf:
        parts.append(f"MFU {perf['perf/mfu']:.1%}")
    if memory := perf.get("perf/memory_gb"):
        parts.append(f"{memory:.2f} GB")
    if "perf/step_s" in perf:
        parts.append(f"{clock((steps - step) * perf['perf/step_s'])} left")
    return " | ".join(parts)


def human(number: float) -> str:
    """1234567 -> '1.23M'."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Seconds -> h:mm:ss or m:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
