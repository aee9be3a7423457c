"""What recipes of models that draw a world share: frames, weights, and how dreams are judged.

A recipe gives `loss(frames, actions, rows)` and a model that is a `WorldModel`. Beside it the model
learns, with weights of their own, what a step is worth and whether it was the last. At every
evaluation the model dreams on from held-out clips, and what can be read off its frames is compared
with the state of the simulator (training/evaluation/dreams.py); the last evaluation adds other
balls than were trained on (`recipe.splits`), the clip of the training data that is most alike, and
latency.

`recipe.blind` replaces every action by 0, in training and in dreams.

Films without a simulator (`data=episodes`, `data=atari`) are judged by how alike frames are, by
what other actions change, and by rewards and ends; where a game's memory says where things are, by
that too, read off frames by a network of its own (training/evaluation/frame_reader.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.worlds.video.graphs import graphed
from models.worlds.video.outcome import BEFORE, LEVELS, outcome_loss, steps_of
from models.worlds.video.world import WorldModel
from training.data.config_episodes import PlayedConfig
from training.data.config_worlds import PinfallConfig, Split, Variant
from training.data.episodes import Played, PlayedData
from training.data.pinfall import Clips, PinfallData
from training.distributed import Processes
from training.envs.pinfall import State, see
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation.dream_physics import Exam
from training.evaluation.dreams import (
    CHUNK,
    FAR,
    HORIZONS,
    compare,
    endurance,
    forked,
    judge,
    latency,
    outcomes,
    shortest,
)
from training.evaluation.film_figures import dream_film
from training.evaluation.frame_reader import Reader, misplaced, read, taught
from training.evaluation.stub_worlds import Retrieval
from training.exchange import write_model
from training.files import write_atomic
from training.recipes.config import check_parts, with_decided
from training.recipes.config_video import VideoWorldConfig
from training.schema import TrainConfig
from training.seeding import torch_generator
from training.torch_step import Batch, TorchStep, build_on
from training.worlds import WORLDS, actions_of, world_data

FRAMEWORK = "torch"
CHANNELS = 3
OUTCOME = 0.05  # weight of rewards and ends: Adam does not mind it, clipping with the rest does
JUDGED = 2  # last steps of a clip that rewards are learned from: all would cost as much as frames
FORKS = 32  # beginnings from which a ball may go either way
READ = 8000  # frames that show where things are in a game
BANK = 2000  # clips of the training data that are searched for one that is alike
OTHER = "error/", "over_copy/", "alive/"  # what is told of other balls than were trained on
SHOWN, EVERY = 3, 3  # clips that are drawn, and which of their frames


def fill_shapes(config: TrainConfig) -> Any:
    """The model's configuration with what the data decides."""
    data: Any = config.data
    decided = {"channels": CHANNELS, "image_size": data.image_size, "actions": actions_of(data)}
    if isinstance(data, PlayedConfig):
        decided["action_parts"] = [part.values for part in data.parts]
    return with_decided(config.model, **decided)


def check_world(config: TrainConfig, name: str) -> None:
    """Raise UserError unless recipe, model and data belong together.

    Args:
        name: of the model.
    """
    kinds = PinfallConfig, PlayedConfig
    check_parts(config, (name,), kinds, ", ".join(WORLDS))
    model: Any = config.model
    data: Any = config.data
    recipe = config.recipe
    assert isinstance(recipe, VideoWorldConfig)
    if recipe.splits and not isinstance(data, PinfallConfig):
        raise UserError(
            f"recipe.splits={[str(split) for split in recipe.splits]} are of data=pinfall: give "
            f"recipe.splits=[] with data={data.name}"
        )
    if model.context < BEFORE:
        raise UserError(
            f"model.context={model.context}: rewards are told from {BEFORE} frames before a step, "
            "give as many or more"
        )
    forks = isinstance(data, PinfallConfig) and data.variant == Variant.fork
    if forks and data.hang < model.context:
        raise UserError(
            f"data.hang={data.hang}: with data.variant=fork a ball must hang for as long as a "
            f"dream is shown, or it has left before; give data.hang={model.context}, "
            "model.context or more"
        )
    if data.seq_len <= max(BEFORE, model.context):
        raise UserError(
            f"data.seq_len={data.seq_len} must be above model.context={model.context}: a clip has "
            "frames that are seen, and those that are asked for"
        )
    if isinstance(data, PinfallConfig) and data.length < model.context + recipe.horizon:
        raise UserError(
            f"data.length={data.length}: a dream has model.context={model.context} frames that are "
            f"seen and recipe.horizon={recipe.horizon} more; raise it, or lower these"
        )
    least = shortest(model)
    if 0 < recipe.endure < least:
        raise UserError(
            f"recipe.endure={recipe.endure} must be {least} or more, or the first and the last "
            "frames of the dream are the same"
        )
    multiple = math.lcm(model.multiple, 2 ** (LEVELS - 1))  # of what tells rewards
    if data.image_size % multiple:
        raise UserError(
            f"data.image_size={data.image_size} must be a multiple of {multiple}, for the patches "
            "and levels of the model"
        )


def check_clips(config: TrainConfig) -> None:
    """Raise UserError if clips are longer than a film transformer with sinks can be taught by."""
    model: Any = config.model
    kept = model.transformer.window + model.transformer.sinks
    if model.transformer.sinks and config.data.seq_len > kept:  # type: ignore[attr-defined]
        raise UserError(
            f"data.seq_len={config.data.seq_len}: with model.transformer.sinks clips are at most "
            f"as long as what is remembered, {kept} frames"
        )


def open_world_data(config: TrainConfig, processes: Processes) -> Any:
    """This process's share of the world's clips. Raises DataError."""
    where = {"seed": config.seed, "rank": processes.rank, "world": processes.world}
    return world_data(config.data, **where)


def clips_on_meta(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Frames [b, T, c, s, s] and actions [b, T-1] of what is computed at once, without data."""
    data: Any = config.data
    rows = rows_at_once(config)
    x = torch.zeros(rows, data.seq_len, CHANNELS, data.image_size, data.image_size, device="meta")
    return x, torch.zeros(rows, data.seq_len - 1, dtype=torch.long, device="meta")


def world_estimate(config: TrainConfig, model: Any, loss: Callable[[], Tensor]) -> Estimate:
    """Sizes of a run with a model on meta, the loss of its frames, and that of outcomes."""
    x, actions = clips_on_meta(config)

    def whole() -> Tensor:
        few = steps_of(x[:, -JUDGED - BEFORE :], actions[:, -JUDGED - BEFORE + 1 :])
        signs, ends = model.outcome(*few)
        nothing = torch.zeros(len(signs), device="meta")
        return loss() + outcome_loss(signs, ends, nothing, nothing)

    data: Any = config.data
    frames = data.batch_size * data.seq_len
    return torch_estimate(model, whole, len(x), config, frames, VideoWorldTraining.unit)


@contextmanager
def changed(model: Any, changes: dict[str, Any]) -> Iterator[None]:
    """Inside, the model has another configuration."""
    before, model.config = model.config, replace(model.config, **changes)
    try:
        yield
    finally:
        model.config = before


class Blind:
    """A world whose actions are all 0."""

    def __init__(self, world: WorldModel) -> None:
        self.world, self.context = world, world.context

    def init_cache(self, frames: Tensor, actions: Tensor, episodes: Tensor, seed: int = 0) -> Any:
        return self.world.init_cache(frames, torch.zeros_like(actions), episodes, seed)

    def step(self, cache: Any, action: Tensor) -> tuple[Tensor, Any]:
        return self.world.step(cache, torch.zeros_like(action))

    def outcome(self, before: Tensor, action: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        return self.world.outcome(before, torch.zeros_like(action), after)


class VideoWorldTraining:
    """Trains one model that is asked for the next frame.

    A subclass names the model's class, which has `initialise(generator)`.
    """

    framework = FRAMEWORK
    unit = "frames"
    remedy = "Lower optim.lr, or set optim.clip_norm"
    alarm: str | None = None
    kind: Callable[[Any], nn.Module]
    methods: tuple[str, ...] = ("outcome",)  # of the model that are called beside forward
    model: Any
    recipe: Any

    def __init__(
        self,
        config: TrainConfig,
        data: PinfallData | PlayedData,
        processes: Processes,
        device: torch.device,
        flops_per_step: float,
    ) -> None:
        assert isinstance(config.recipe, VideoWorldConfig)
        self.config, self.recipe, self.data = config, config.recipe, data
        self.processes, self.flops_per_step = processes, flops_per_step
        self.units_per_step = data.config.batch_size * data.config.seq_len
        filled = fill_shapes(config)
        self.model = build_on(device, lambda: type(self).kind(filled), self.initialise)
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.trainer = TorchStep(
            self.model, [], config.optim, config.scale, processes, config.loop.steps
        )
        if self.trainer.sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            for method in self.methods:
                register_fsdp_forward_method(self.model, method)
        self.found: dict[str, Any] = {}
        self.terms: dict[str, Tensor | float] = {}

    def initialise(self, model: Any) -> None:
        device = next(model.parameters()).device
        model.initialise(torch_generator(self.config.seed, "init", device=device))

    def loss(self, frames: Tensor, actions: Tensor, rows: Tensor) -> Tensor:
        """Of clips [b, T, c, s, s] in [0, 1] and the actions [b, T-1] between their frames.

        Args:
            rows: [b] a number of each clip's own, in all of the run.
        """
        raise NotImplementedError

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        self.model.train()
        size = self.data.config.batch_size
        rows = self.data.mine(self.trainer.count * size + np.arange(size))
        self.terms = {}
        metrics = self.trainer.update(batch | {"row": rows}, self.batch_loss)
        terms = {f"train/{name}": self.trainer.mean(x) for name, x in self.terms.items()}
        return {**metrics, **terms}

    def batch_loss(self, batch: Batch) -> Tensor:
        actions = batch["actions"]
        if self.recipe.blind:
            actions = torch.zeros_like(actions)
        frames = self.see(batch)
        steps = slice(-JUDGED - BEFORE, None), slice(-JUDGED - BEFORE + 1, None)  # of each clip
        told = self.model.outcome(*steps_of(frames[:, steps[0]], actions[:, steps[1]]))
        wanted = (
            batch[name][:, steps[1]][:, BEFORE - 1 :].flatten() for name in ("rewards", "ends")
        )
        frame = self.loss(frames, actions, batch["row"])
        outcome = outcome_loss(*told, *wanted)
        self.note(frame=frame, outcome=outcome)
        return frame + OUTCOME * outcome

    def note(self, **terms: Tensor) -> None:
        """Terms of the loss, to be reported: their mean over the parts of a batch."""
        for name, value in terms.items():
            part = value.detach() / self.config.optim.accumulate
            self.terms[name] = self.terms.get(name, 0.0) + part

    def see(self, parts: Batch) -> Tensor:
        """Frames [b, T, 3, s, s] in [0, 1]."""
        if not self.simulated:
            return parts["frames"].movedim(-1, -3).float() / 255
        return see(parts, self.data.config.variant, self.data.config.image_size).float()

    @property
    def simulated(self) -> bool:
        """Whether there is a simulator that knows the state."""
        return isinstance(self.data, PinfallData)

    @property
    def forks(self) -> bool:
        """Whether it is the world in which a ball may go either way."""
        return isinstance(self.data, PinfallData) and self.data.config.variant == Variant.fork

    def watch(self, clips: Clips | Played) -> Tensor:
        """The same of held-out clips."""
        names = ("x", "radius", "hue", "plate") if self.simulated else ("frames",)
        device = self.trainer.device
        return self.see({k: torch.from_numpy(getattr(clips, k)).to(device) for k in names})

    def draw(self, state: State) -> Tensor:
        """The same of states [n, ...]."""
        return self.see(state._asdict())

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Inside, the model has its (averaged) weights in full, in every process.

        It is judged in float32, and played so, whatever it learned in; where FSDP has bf16 weights
        alone, in their precision.
        """
        self.model.eval()
        with self.trainer.averaged_weights(), ExitStack() as stack:
            if self.trainer.sharded:
                self.model.unshard()
                stack.callback(self.model.reshard)
                stack.enter_context(self.trainer.autocast())
            yield

    def exam(self, split: Split = Split.shown) -> Exam:
        context = self.model.context
        frames = context + self.recipe.horizon
        if not self.simulated:
            chosen = self.data.spread(self.recipe.dreams, frames, held=True)
            clips, states = self.data.gather(chosen, frames), self.data.states(chosen, frames)
            known = torch.from_numpy(states).to(self.trainer.device)
            return Exam(clips, self.watch(clips), context, None, known)
        clips = self.data.heldout(self.recipe.dreams, frames, split)
        return Exam(clips, self.watch(clips), context, self.data.config.variant)

    def ask(
        self, world: WorldModel, exam: Exam, steering: bool = True
    ) -> tuple[dict[str, float], dict[str, list[float]], Tensor]:
        """What a dream is worth: by the state, or, where nobody knows it, by its frames."""
        if self.simulated:
            return judge(world, exam, steering)
        found, series, told = compare(world, exam, self.model.config.actions)
        if self.data.known:
            assert exam.states is not None
            parts = (read(self.reader, x) for x in (told, exam.frames[:, exam.context :]))
            true = exam.states[:, exam.context - 1 :]
            found |= misplaced(*parts, true, self.data.known, HORIZONS, FAR)
        return found, series, told

    @cached_property
    def reader(self) -> Reader:
        """Of frames that are trained on, and what is known of them."""
        chosen = self.data.spread(READ, 1, held=False)
        states = torch.from_numpy(self.data.states(chosen, 1)[:, 0]).to(self.trainer.device)
        frames = self.watch(self.data.gather(chosen, 1))[:, 0]
        return taught(frames, states, self.data.known, *self.data.screen)

    def fork(self, world: WorldModel) -> dict[str, float]:
        return forked(world, self.draw, FORKS, self.trainer.device, self.data.config.hang)

    def variations(self) -> dict[str, dict[str, Any]]:
        """By name, what is changed in the model's configuration: dreams of the same weights that
        are judged too, at the end."""
        return {}

    def told(self, world: WorldModel, exam: Exam) -> dict[str, float]:
        """What is told of dreams that stand beside those that are asked for."""
        found, _, _ = self.ask(world, exam, steering=False)
        found = {k: v for k, v in found.items() if k.startswith((*OTHER, "psnr/"))}
        if self.forks:
            found |= self.fork(world)
        return found

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Errors of dreams; those on other balls, retrieval and latency too, if `final`."""
        exam = self.exam()
        with self.whole_model():
            world = Blind(self.model) if self.recipe.blind else self.model
            found, series, told = self.ask(world, exam)
            found |= outcomes(world, exam)
            if final:
                for split in self.recipe.splits:
                    other, _, _ = judge(world, self.exam(split), steering=False)
                    found |= {f"{split}/{k}": v for k, v in other.items() if k.startswith(OTHER)}
                self.found["latency"] = latency(world, exam)
                if exam.frames.is_cuda and not self.trainer.sharded:
                    with graphed(self.model):
                        self.found["latency_graphed"] = latency(world, exam)
                if self.recipe.endure:
                    self.found["latency"] |= endurance(world, exam, self.recipe.endure)
                found |= self.misled()
                if self.forks:
                    found |= self.fork(world)
                for name, changes in self.variations().items():
                    with changed(self.model, changes):
                        found |= {f"{name}/{k}": v for k, v in self.told(world, exam).items()}
        if final and self.simulated:
            known = self.watch(self.data.bank(BANK, exam.frames.shape[1]))
            other, _, _ = judge(Retrieval(known, exam.context), exam, steering=False)
            found |= {f"retrieved/{k}": v for k, v in other.items() if k.startswith("error/")}
        self.found["series"] = series
        truth = exam.frames[:SHOWN, exam.context - 1 :]
        self.film = truth[:, ::EVERY], torch.cat([truth[:, :1], told[:SHOWN]], dim=1)[:, ::EVERY]
        return {f"eval/{name}": value for name, value in found.items()}

    def misled(self) -> dict[str, float]:
        """How much larger the loss is if clips are told the actions of others; 1 for a model that
        does not mind. Noise is the same."""
        if not self.hears:
            return {}
        clips: Any = self.data.heldout(self.recipe.dreams, self.data.config.seq_len)
        frames, actions = self.watch(clips), torch.from_numpy(clips.actions).to(self.trainer.device)
        if self.recipe.blind:
            actions = torch.zeros_like(actions)
        rows = torch.arange(len(frames), device=frames.device)

        def loss(told: Tensor) -> Tensor:
            parts = zip(*(x.split(CHUNK) for x in (frames, told, rows)), strict=True)
            return sum((len(part[0]) * self.loss(*part) for part in parts), torch.zeros(()))

        return {"shuffled_actions": (loss(actions.roll(1, 0)) / loss(actions)).item()}

    @property
    def hears(self) -> bool:
        """Whether the loss is told the actions of the data."""
        return True

    def summary(self) -> dict[str, Any]:
        return {"parameters": self.parameters, **self.found}

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """The model, and a strip of dreams beside the truth."""
        weights = self.trainer.full_weights()
        if not self.processes.is_main:
            return
        write_model(directory, self.left(weights), self.model.config)
        truth, told = (x.permute(0, 1, 3, 4, 2).cpu().numpy() for x in self.film)
        write_atomic(directory / "figures" / "dream.svg", dream_film(truth, told, EVERY))

    def left(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of all weights, those of the world that the run leaves."""
        return weights

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)
