"""A run on disk: `<runs_dir>/<experiment>/<run>/`, its lock, its provenance, its results.

    config.yaml    resolved configuration      env.json      commit, diff, versions, hardware
    metrics.jsonl  perf.jsonl                  status.json   state and heartbeat
    checkpoints/   figures/                    results.json  what came out
    model.safetensors, model.json: the trained weights, for exchange

The name of an unnamed run is derived from what it computes, so the same command finds its own
directory again, and another configuration gets another one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import socket
import sys
import time
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

from training.distributed import Processes
from training.errors import UserError
from training.files import write_atomic, write_json, writing
from training.provenance import provenance
from training.schema import TrainConfig, identity


def digest(value: Any) -> str:
    """Hex digest of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """Enums and dataclasses -> what JSON and YAML can hold, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def run_path(config: TrainConfig) -> Path:
    """Where this configuration's run lives."""
    name = config.run or (
        f"{config.scale.name}-seed{config.seed}-{digest(plain(identity(config)))[:8]}"
    )
    return Path(config.runs_dir).expanduser() / (config.experiment or "unnamed") / name


def differing_keys(old: Any, new: Any, path: str = "") -> list[str]:
    """Keys at which two nested dicts differ, as `a.b: old -> new`."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [f"{path}: {old} -> {new}"] if old != new else []
    found = []
    for key in sorted({*old, *new}):
        found += differing_keys(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return found


class RunDirectory:
    """An open run directory, held against every other live process until closed."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.config = config
        self.processes = processes
        self.is_main = processes.is_main
        self.path = run_path(config)
        self.lock: Any = None
        self.beat = -math.inf

    def __enter__(self) -> RunDirectory:
        self.processes.main_only(self.open)
        return self

    def open(self) -> None:
        """Create, lock and check the directory. Raises UserError."""
        try:
            (self.path / "figures").mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "lock", "a+")  # noqa: SIM115
            self.acquire()
            self.refuse_other_config()
        except OSError as error:
            raise UserError(
                f"cannot use the run directory {self.path}: {error.strerror or error}; "
                "set runs_dir=<a writable directory> or AFFERENT_RUNS"
            ) from error
        self.write_provenance()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.lock is None:
            return
        if error is not None:
            how = "interrupted" if isinstance(error, KeyboardInterrupt | UserError) else "failed"
            self.try_status(how, message=str(error) or (kind.__name__ if kind else ""))
        self.lock.close()

    def acquire(self) -> None:
        """Hold the lock, which the system drops however this process ends."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "another process"
            self.lock.close()
            self.lock = None
            raise UserError(
                f"the run directory {self.path} is held by {holder}, which is still running: "
                "wait for it, stop it, or set run=<another name>"
            ) from None
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()

    def refuse_other_config(self) -> None:
        """Raise UserError if this directory holds a run of another configuration."""
        file = self.path / "identity.json"
        if file.exists():
            changes = differing_keys(self.recorded(file), plain(identity(self.config)))
            if changes:
                raise UserError(
                    f"{self.path} holds a run of another configuration; {'; '.join(changes[:5])}"
                    f"{' ...' if len(changes) > 5 else ''}. Set run=<another name>, "
                    "or restore these values to resume it"
                )

    def recorded(self, file: Path) -> dict[str, Any]:
        """What a file says of the run. Raises UserError if that cannot be told."""
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(
                f"{file} is damaged ({error}), so it is not known which run this is: set "
                f"run=<another name>, or remove {self.path}"
            ) from error
        if not isinstance(content, dict):
            raise UserError(f"{file} must hold a mapping: set run=<another name>")
        return content

    def claim(self) -> None:
        """From now on the directory is this configuration's: what was refused before is not."""
        if self.is_main:
            write_json(self.path / "identity.json", plain(identity(self.config)))

    def bind(self, key: str, value: Any) -> None:
        """Record a fact the run depends on (a corpus's hash); refuse a resume where it changed."""

        def check() -> None:
            file = self.path / "bound.json"
            bound = self.recorded(file) if file.exists() else {}
            if key in bound and bound[key] != value:
                raise UserError(
                    f"{key} changed since this run began: {bound[key]} -> {value}; "
                    "set run=<another name> to start a new one"
                )
            write_json(file, {**bound, key: value})

        self.processes.main_only(check)

    def write_provenance(self) -> None:
        from omegaconf import OmegaConf

        write_atomic(self.path / "config.yaml", OmegaConf.to_yaml(plain(self.config)))
        first, now = self.path / "env.json", provenance()
        if not first.exists():
            write_json(first, now)
            return
        with writing(self.path), open(self.path / "restarts.jsonl", "a") as file:
            file.write(json.dumps(now) + "\n")

    def try_status(self, state: str, **facts: Any) -> None:
        """Status of a run that is ending badly; a full disk must not hide the reason."""
        try:
            self.status(state, **facts)
        except UserError:
            print(f"{self.path}: status {state} could not be written", file=sys.stderr)

    def status(self, state: str, **facts: Any) -> None:
        """running, finished, interrupted or failed; the heartbeat is the time of this call."""
        if self.is_main:
            beat = {"status": state, "heartbeat": time.time(), "pid": os.getpid(), **facts}
            write_json(self.path / "status.json", beat)

    def heartbeat(self, step: int) -> None:
        """Say that the run is alive and where it is, at most every few seconds."""
        if time.monotonic() - self.beat > 5.0:
            self.beat = time.monotonic()
            self.status("running", step=step)

    def finish(self, results: dict[str, Any]) -> None:
        """Record what came out; from now on the same command returns it."""
        if self.is_main:
            write_json(self.path / "results.json", results)
            self.status("finished", step=results["steps"])
