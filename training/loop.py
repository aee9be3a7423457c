"""The one loop. It asks data for batch i and the recipe for a step, and owns everything around it:
the step count, the cadence of logging, evaluation and checkpoints, budgets, signals and resume.

It knows no framework and no paper. A recipe knows no files. A run that is killed at any instant
and started again writes the same metrics.jsonl and reaches the same weights, because the batch and
every random stream of step i are functions of i, and the checkpoint holds the rest.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, ClassVar

from training.checkpoint import Checkpoints
from training.distributed import Processes
from training.errors import RunStopped
from training.logging import Logger, progress_line
from training.meter import LoopState, Meter
from training.profiling import trace
from training.protocols import Data, Recipe
from training.run_directory import RunDirectory
from training.schema import LoopConfig


@dataclass
class Outcome:
    """How a run ended."""

    state: LoopState
    metrics: dict[str, float]
    stopped_by: str


class StopSignals:
    """Remembers SIGTERM, SIGUSR1 and the first SIGINT; the loop stops after the step in hand."""

    CODES: ClassVar = {signal.SIGTERM: 85, signal.SIGUSR1: 85, signal.SIGINT: 130}

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in self.CODES:
            try:
                self.previous[number] = signal.signal(number, self.remember)
            except ValueError:  # not the main thread: the caller's business
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def remember(self, number: int, _: FrameType | None) -> None:
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def fit(
    recipe: Recipe,
    data: Data,
    config: LoopConfig,
    directory: RunDirectory,
    logger: Logger,
    processes: Processes,
) -> Outcome:
    """Train `recipe` on `data`, from the newest whole checkpoint if there is one.

    Raises RunStopped, with everything saved, on a signal, a non-finite metric or a failed write.
    """
    checkpoints = Checkpoints(directory.path / "checkpoints", processes, config.keep_checkpoints)
    state = resume(recipe, checkpoints, logger)
    meter = Meter(recipe, state, processes.world)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        pool = stack.enter_context(ThreadPoolExecutor(1))
        tracing = stack.enter_context(ExitStack())
        first_traced, last_traced = config.profile_steps or (-1, -2)
        upcoming: Future | None = None
        spent = bool(state.step) and out_of_budget(config, state.units, meter.elapsed())
        stopped_by = "budget" if processes.any(spent) else "steps"

        while state.step < config.steps and stopped_by == "steps":
            batch = upcoming.result() if upcoming else data.batch(state.step)
            ahead = state.step + 1  # read ahead while the step runs
            upcoming = pool.submit(data.batch, ahead) if ahead < config.steps else None
            if state.step == first_traced:
                tracing.enter_context(trace(recipe.framework, directory.path / "figures"))
            meter.pending.append(recipe.step(batch))
            state.step += 1
            state.units += recipe.units_per_step
            if state.step == last_traced + 1:
                tracing.close()

            last = state.step == config.steps
            due_log = last or state.step % config.log_every == 0
            due_eval = not last and due(state.step, config.eval_every)
            due_save = last or due(state.step, config.checkpoint_every)
            # Processes agree on stopping only where they meet anyway: a reduction costs a sync.
            meet = processes.world == 1 or due_log
            stop = meet and not last and processes.any(signals.received is not None)
            over = (
                meet
                and not last
                and processes.any(out_of_budget(config, state.units, meter.elapsed()))
            )

            if due_log or due_eval or due_save or stop or over:
                meter.collect(state)
                check_finite(state, data, checkpoints, recipe.remedy)
            row, perf = meter.row(state) if due_log else ({}, {})
            if row and logger.is_main:
                line = progress_line(state.step, config.steps, row, perf, recipe.unit)
                logger.progress.show(line, final=last)
                directory.heartbeat(state.step)
            if due_eval:
                row.update(evaluate(recipe, meter))
                sound_alarm(recipe, logger, state.step)
            logger.log(state.step, row, perf)
            if due_save or stop or over:
                save(state, recipe, checkpoints, logger, meter)
            if over:
                stopped_by = "budget"
            if stop:
                raise stopped(signals, state.step)

        metrics = dict(evaluate(recipe, meter, final=True))
        sound_alarm(recipe, logger, state.step)
        logger.log(state.step, metrics, {})
    return Outcome(state, metrics, stopped_by)


def save(
    state: LoopState, recipe: Recipe, checkpoints: Checkpoints, logger: Logger, meter: Meter
) -> None:
    """One checkpoint, and the rows that belong to it on the disk."""
    state.elapsed_s, state.rows = meter.elapsed(), logger.rows
    logger.sync()
    with meter.paused():
        checkpoints.save(state.step, recipe, asdict(state))


def stopped(signals: StopSignals, step: int) -> RunStopped:
    """The error that ends a run on a signal."""
    received = signals.received or signal.SIGTERM  # or another process was asked
    return RunStopped(
        f"stopped by {received.name} after step {step}; it is saved, "
        "the same command resumes there",
        StopSignals.CODES[received],
    )


def due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def resume(recipe: Recipe, checkpoints: Checkpoints, logger: Logger) -> LoopState:
    """The state to go on from: the newest whole checkpoint, or the beginning."""
    newest = checkpoints.newest()
    state = LoopState()
    if newest is not None:
        state = LoopState(**checkpoints.load(newest, recipe))
        if logger.is_main:
            logger.progress.message(f"resuming after step {state.step}")
    logger.rewind(state.step, state.rows)
    return state


def evaluate(recipe: Recipe, meter: Meter, final: bool = False) -> Mapping[str, float]:
    """Evaluate off the training clock."""
    with meter.paused():
        return recipe.evaluate(final)


def sound_alarm(recipe: Recipe, logger: Logger, step: int) -> None:
    """Say what an evaluation found wrong, on a line that stays."""
    if recipe.alarm and logger.is_main:
        logger.progress.message(f"after step {step}: {recipe.alarm}")


def check_finite(state: LoopState, data: Data, checkpoints: Checkpoints, remedy: str) -> None:
    """Raise RunStopped at the first step whose metrics are not finite, before anything is saved."""
    for index, metrics in enumerate(state.window):
        bad = {k: v for k, v in metrics.items() if not math.isfinite(v)}
        if bad:
            step = state.step - len(state.window) + index
            saved = checkpoints.steps()
            good = f"{checkpoints.path(saved[-1])}" if saved else "none was saved yet"
            if step == 0:
                remedy = "Nothing was trained yet: look at that batch and at the weights it met"
            raise RunStopped(
                f"{', '.join(f'{k}={v}' for k, v in bad.items())} at step {step}, "
                f"batch {', '.join(data.ids(step))}; last good checkpoint: {good}. "
                f"{remedy}, and give the run another name with run=..."
            )


def out_of_budget(config: LoopConfig, units: int, elapsed_s: float) -> bool:
    """Whether a run that has used this much ends here."""
    over_units = config.max_units is not None and units >= config.max_units
    over_time = config.time_limit_s is not None and elapsed_s >= config.time_limit_s
    return over_units or over_time
