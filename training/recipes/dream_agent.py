"""An agent that learns in dreams, and acts in the world: `recipe=dream_agent`.

DIAMOND (2024, arXiv:2405.12399), algorithm 1, its third part. One step, from frames that somebody
saw:

    o_t         the last frames;  a_t ~ pi(o_t);  r_t, end_t, o_{t+1} as the world model tells them
    G_t         lambda-returns of r, end and V(o), over `recipe.horizon` frames    (returns.py)
    loss        mean of  (V(o_t) - G_t)^2 - ln pi(a_t | o_t) (G_t - V(o_t)) - entropy H(pi(o_t))

with G_t and G_t - V(o_t) taken as numbers, and nothing after an end. What differs: dreams cost more
than learning from them, so that each may be learned from `recipe.passes` times, with the ratio and
the clip of PPO (2017, arXiv:1707.06347), and `recipe.normalise` makes G_t - V(o_t) of size 1, so
that rare rewards count; once and not is the loss above. The model does not learn. The
simulator is never asked: how many of its steps the agent learned from is counted, and recorded
(`eval/learned_outside`). With `recipe.world=null` the simulator is the world: the ceiling.

At every evaluation the agent acts outside, likeliest action first, beside one who does anything and
one who knows where the ball will land; `eval/share` is how far it is from the one to the other. At
the end, policies of several kinds are ranked by what they are rewarded with inside and outside.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from models.agents.actor_critic import ActorCritic
from models.agents.config import ActorCriticConfig
from models.worlds.video.noise import even
from training.data.config_worlds import PinfallConfig
from training.data.pinfall import Clips, PinfallData
from training.distributed import Processes
from training.envs.pinfall import ACTIONS, see
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation.lives import (
    ACTED,
    Inside,
    Outside,
    Place,
    Policy,
    all_knowing,
    follower,
    idler,
    live,
    ranking,
    wanderer,
)
from training.exchange import write_model
from training.pretrained import locate
from training.recipes.config import check_parts, with_decided
from training.recipes.config_video import DreamAgentConfig
from training.recipes.video_world import CHANNELS, open_world_data
from training.returns import lambda_returns
from training.schema import TrainConfig
from training.seeding import stream_seed, torch_generator
from training.torch_step import Batch, TorchStep, build_on
from training.worlds import SimulatedWorld, Start, open_world, world_of

FRAMEWORK = "torch"
FOLLOWERS = 0.0, 0.25, 0.5, 0.75  # how often they do anything


class Dreams(NamedTuple):
    """What was lived through inside: b dreams of h steps, whose first n frames were seen."""

    frames: Tensor  # [b, n + h, 3, s, s]
    action: Tensor  # [b, h], and below
    logp: Tensor  # of it, then
    returns: Tensor
    better: Tensor  # than the critic thought
    on: Tensor  # 1 until the end
    reward: Tensor  # mean of a step


class DreamAgentTraining:
    """Trains an actor and a critic in a world that does not change."""

    framework = FRAMEWORK
    unit = "frames"
    remedy = "Lower optim.lr, or set optim.clip_norm"
    alarm: str | None = None

    def __init__(
        self,
        config: TrainConfig,
        data: PinfallData,
        processes: Processes,
        device: torch.device,
        world: SimulatedWorld | None,
        flops_per_step: float,
    ) -> None:
        assert isinstance(config.recipe, DreamAgentConfig)
        self.config, self.recipe, self.data = config, config.recipe, data
        self.processes, self.flops_per_step = processes, flops_per_step
        self.units_per_step = data.config.batch_size * self.recipe.horizon
        filled = fill_shapes(config)
        self.model: Any = build_on(device, lambda: ActorCritic(filled), self.initialise)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trainer = TorchStep(
            self.model,
            [],
            config.optim,
            config.scale,
            processes,
            config.loop.steps * self.recipe.passes,
        )
        self.outside = Outside(data.config.variant, data.config.image_size)
        self.inside: Place = self.outside if world is None else Inside(world.model)
        self.dreams = world is not None
        self.found: dict[str, Any] = {}

    def initialise(self, model: Any) -> None:
        device = next(model.parameters()).device
        model.initialise(torch_generator(self.config.seed, "init", device=device))

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        self.model.train()
        size, passes = self.data.config.batch_size, self.recipe.passes
        rows = self.data.mine(self.trainer.count // passes * size + np.arange(size))
        dreams = self.dream(self.trainer.to_device(batch | {"row": rows}))
        metrics: dict[str, Tensor | float] = {}
        for _ in range(passes):
            self.terms: dict[str, Tensor] = {}
            chosen = {"index": np.arange(len(rows))}
            metrics = self.trainer.update(chosen, lambda part: self.loss(dreams, part["index"]))
        terms = {f"train/{name}": self.trainer.mean(x) for name, x in self.terms.items()}
        return {**metrics, **terms, "train/reward": self.trainer.mean(dreams.reward)}

    def start(self, clips: Clips) -> Start:
        """The first `context` frames of clips, and the state after them."""
        n, config = self.model.config.context, self.data.config
        device = self.trainer.device
        parts = {name: torch.from_numpy(getattr(clips, name)[:, :n]) for name in
                 ("x", "radius", "hue", "plate")}  # fmt: skip
        frames = see(parts, config.variant, config.image_size).float().to(device)
        actions = torch.from_numpy(clips.actions[:, : n - 1]).to(device)
        return Start(frames, actions, clips.state(n - 1))

    @torch.no_grad()
    def dream(self, batch: Batch) -> Dreams:
        """What the agent, as it is, does inside."""
        clips = Clips(*(batch[name].cpu().numpy() for name in Clips._fields))
        start, rows, seed = self.start(clips), batch["row"], stream_seed(self.config.seed, "dream")
        cache, frames = self.inside.begin(start, rows, seed), start.frames
        actions, logps, values, rewards, ends = [], [], [], [], []
        for count in range(self.recipe.horizon + 1):
            logits, value = self.model(frames)
            values.append(value.float())
            if count == self.recipe.horizon:
                break
            logs = logits.float().log_softmax(-1)
            chance = even(seed, rows, (count, ACTED), ())
            action = (logs.exp().cumsum(-1) < chance[:, None]).sum(-1).clamp(max=ACTIONS - 1)
            logps.append(logs.gather(1, action[:, None])[:, 0])
            lived, cache = self.inside.step(cache, action)
            actions.append(action)
            rewards.append(lived.reward)
            ends.append(lived.end)
            frames = torch.cat([frames, lived.frame[:, None]], dim=1)
        value, reward, end = (torch.stack(x, dim=1) for x in (values, rewards, ends))
        recipe = self.recipe
        returns = lambda_returns(reward, value[:, 1:], end, recipe.discount, recipe.lam)
        over = torch.from_numpy(clips.missed[:, start.frames.shape[1] - 1].any(-1))
        before = torch.cat([over[:, None].to(end.device), end[:, :-1]], dim=1)
        on = (before.cumsum(1) == 0).float()
        better = returns - value[:, :-1]
        if recipe.normalise:
            size = self.trainer.mean((better.square() * on).sum() / on.sum().clamp(min=1)).sqrt()
            better = better / size.clamp(min=1e-6)
        action, logp = torch.stack(actions, dim=1), torch.stack(logps, dim=1)
        won = (reward * on).sum() / on.sum().clamp(min=1)
        return Dreams(frames, action, logp, returns, better, on, won)

    def loss(self, dreams: Dreams, index: Tensor) -> Tensor:
        """Of the dreams `index`: REINFORCE with a critic, or, from the second pass on, PPO."""
        h, n = self.recipe.horizon, self.model.config.context
        frames, on = dreams.frames[index], dreams.on[index]
        windows = torch.stack([frames[:, t : t + n] for t in range(h)], dim=1)
        logits, value = (x.float().unflatten(0, (-1, h)) for x in self.model(windows.flatten(0, 1)))
        logs = logits.log_softmax(-1)
        logp = logs.gather(-1, dreams.action[index][..., None])[..., 0]
        ratio, better = (logp - dreams.logp[index]).exp(), dreams.better[index]
        held = ratio.clamp(1 - self.recipe.clip, 1 + self.recipe.clip)
        each = {
            "critic": (value - dreams.returns[index]).square(),
            "actor": -torch.minimum(ratio * better, held * better),
            "entropy": -(logs.exp() * logs).sum(-1),
        }
        lived = dreams.on.mean().clamp(min=1 / dreams.on.numel())
        means = {name: (x * on).sum() / lived / on.numel() for name, x in each.items()}
        for name, mean in means.items():
            part = mean.detach() / self.config.optim.accumulate
            self.terms[name] = self.terms.get(name, 0.0) + part
        return means["critic"] + means["actor"] - self.recipe.entropy * means["entropy"]

    def act(self, seen: Tensor, chance: Tensor, cache: Any) -> Tensor:
        """The likeliest action."""
        return self.model(seen)[0].argmax(-1)

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """What lives outside are worth; `final` adds how policies are ranked."""
        self.model.eval()
        recipe, config = self.recipe, self.data.config
        n = self.model.config.context
        judged = Outside(config.variant, config.image_size)
        policies: dict[str, Policy] = {"return": self.act, "random": wanderer,
                                       "oracle": all_knowing(config.variant)}  # fmt: skip
        with self.trainer.averaged_weights():
            start = self.start(going_on(self.data.heldout(recipe.episodes, n), n - 1))
            found = {name: live(judged, start, policy, recipe.frames).mean().item()
                     for name, policy in policies.items()}  # fmt: skip
            steps = torch.tensor(
                self.outside.steps, dtype=torch.float64, device=self.trainer.device
            )
            learned = self.trainer.mean(steps).item() * self.processes.world
            if final and recipe.ranked and self.dreams:
                found |= self.ranks(start)
        span = found["oracle"] - found["random"]
        found["share"] = (found["return"] - found["random"]) / span if span else 0.0
        found["learned_outside"] = learned
        return {f"eval/{name}": value for name, value in found.items()}

    def ranks(self, start: Start) -> dict[str, float]:
        """Whether who is better inside is better outside."""
        some = self.recipe.ranked
        state = type(start.state)(*(part[:some] for part in start.state))
        few = Start(start.frames[:some], start.actions[:some], state)
        judged = Outside(self.outside.variant, self.outside.size)
        policies = {f"follows, {noise:.0%} anything": follower(noise) for noise in FOLLOWERS}
        policies |= {"agent": self.act, "anything": wanderer, "nothing": idler}
        found = ranking(self.inside, judged, few, policies, self.recipe.ranked_frames)
        inside, outside = (list(side) for side in zip(*found.values(), strict=True))
        self.found["ranked"] = list(found)
        self.found["series"] = {"inside": inside, "outside": outside}
        if 1 in (len(set(inside)), len(set(outside))):
            return {"ranks": 0.0}  # all are alike: nobody is ranked
        return {"ranks": float(spearmanr(inside, outside).statistic)}

    def summary(self) -> dict[str, Any]:
        return {"parameters": self.parameters, **self.found}

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        weights = self.trainer.full_weights()
        if self.processes.is_main:
            write_model(directory, weights, self.model.config)

    def state_dict(self) -> dict[str, Any]:
        steps = torch.tensor(self.outside.steps)
        return self.trainer.state_dict() | {"outside": steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)
        self.outside.steps = int(state["outside"])


def going_on(clips: Clips, frame: int) -> Clips:
    """Those whose ball is not lost at a frame."""
    kept = ~clips.missed[:, frame].any(-1)
    return Clips(*(part[kept] for part in clips))


def fill_shapes(config: TrainConfig) -> Any:
    """The model's configuration with what the data decides."""
    assert isinstance(config.data, PinfallConfig)
    size = config.data.image_size
    return with_decided(config.model, channels=CHANNELS, image_size=size, actions=ACTIONS)


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("actor_critic",), (PinfallConfig,), "pinfall")
    assert isinstance(config.model, ActorCriticConfig) and isinstance(config.data, PinfallConfig)
    n = config.model.context
    if config.data.seq_len < n:
        raise UserError(
            f"data.seq_len={config.data.seq_len} must be model.context={n} or more: that many "
            "frames are seen before the first action"
        )
    try:
        fill_shapes(config)
    except ValueError as error:
        raise UserError(str(error)) from error


def open_dreams(config: TrainConfig, device: torch.device) -> SimulatedWorld | None:
    """The world of recipe.world, which must be of the same data.

    Raises:
        UserError: it is not, or sees more frames than the agent.
    """
    recipe = config.recipe
    assert isinstance(recipe, DreamAgentConfig) and isinstance(config.data, PinfallConfig)
    if recipe.world is None:
        return None
    directory = locate(recipe.world, "recipe.world")
    own, _ = world_of(directory / "config.yaml")
    if not isinstance(own, PinfallConfig):
        raise UserError(
            f"recipe.world={recipe.world} is of data={own.name}, which has no simulator that an "
            "agent could be judged by: name a run of data=pinfall"
        )
    for key in ("variant", "image_size"):
        if getattr(own, key) != getattr(config.data, key):
            raise UserError(
                f"recipe.world={recipe.world} is of data.{key}={getattr(own, key)}, not of "
                f"{getattr(config.data, key)}: give data.{key}={getattr(own, key)}"
            )
    world = open_world(directory, device)
    assert isinstance(world, SimulatedWorld)
    if world.model.context > config.model.context:  # type: ignore[union-attr]
        raise UserError(
            f"recipe.world={recipe.world} must see {world.model.context} frames, "
            f"model.context={config.model.context} are shown: raise it, and data.seq_len"  # type: ignore[union-attr]
        )
    if recipe.draw_steps is not None:
        model: Any = world.model
        try:
            model.config = replace(model.config, steps=recipe.draw_steps)
        except ValueError as error:
            raise UserError(f"recipe.draw_steps={recipe.draw_steps}: {error}") from error
    return world


def build(config: TrainConfig, processes: Processes, device: torch.device) -> DreamAgentTraining:
    """The recipe of `config` with its data and its world, its model initialised on `device`."""
    check(config)
    world = open_dreams(config, device)
    flops = estimate(config).flops_per_step
    data = open_world_data(config, processes)
    return DreamAgentTraining(config, data, processes, device, world, flops)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device: of the agent alone, without the world."""
    check(config)
    recipe, data = config.recipe, config.data
    assert isinstance(recipe, DreamAgentConfig) and isinstance(data, PinfallConfig)
    filled, rows = fill_shapes(config), rows_at_once(config)
    with torch.device("meta"):
        model = ActorCritic(filled)
        shape = rows, filled.context, CHANNELS, data.image_size, data.image_size
        frames = torch.zeros(shape)

    def loss() -> Tensor:
        told = [model(frames) for _ in range(recipe.horizon)]
        return torch.stack([logits.square().mean() + value.mean() for logits, value in told]).sum()

    units = data.batch_size * recipe.horizon
    return torch_estimate(model, loss, rows, config, units, DreamAgentTraining.unit)
