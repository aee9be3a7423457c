"""A world of tokens, and of actions that nobody labelled: `recipe=genie`.

Genie (2024, arXiv:2402.15391). In the first `recipe.prepare` of the run, from frames alone,

    tokenizer   |decode(encode(x_t)) - x_t|^2
    latents     |x_{t+1} told from x_1 .. x_t and the code of what was done - x_{t+1}|^2
    alike       `recipe.spread` of how little the numbers of latent actions vary in a clip

(the last two for `recipe.settle` of it, with noise of `recipe.jitter` on these numbers before they
are rounded), then, with both as they are, the dynamics:

    frame       cross-entropy of the masked tokens of clips, beside those that are not masked and
                what the frame before each looks like

The first frame of a clip is never masked, of the others a share between `recipe.masked` and all of
the tokens. What differs: a share of the frames (`recipe.clean`) is not masked at all, since frames
of the past are whole when one is drawn; every frame's share is its own; some of the numbers of the
codes that are shown are a level off (`recipe.blur`), since in dreams the past is the model's own;
and `alike`, in the place of what keeps a codebook in use.

At every evaluation `recipe.labelled` clips whose actions are known say which latent action each
action is: the one that is most often found where it was done.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from models.worlds.video.config import GenieConfig
from models.worlds.video.fsq import moved
from models.worlds.video.genie import Genie, after
from models.worlds.video.noise import even, normal
from training.data.config_episodes import PlayedConfig
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate
from training.recipes.config_video import GenieRecipeConfig
from training.recipes.video_world import FRAMEWORK as FRAMEWORK
from training.recipes.video_world import (
    VideoWorldTraining,
    check_clips,
    check_world,
    clips_on_meta,
    fill_shapes,
    open_world_data,
    world_estimate,
)
from training.schema import TrainConfig
from training.seeding import stream_seed


class GenieTraining(VideoWorldTraining):
    """Trains tokenizer and latent actions, then the dynamics."""

    kind = Genie
    methods = ("outcome", "prepare", "encode", "decode", "done", "looks")
    model: Genie
    recipe: GenieRecipeConfig

    def loss(self, frames: Tensor, actions: Tensor, rows: Tensor) -> Tensor:
        recipe, share = self.recipe, self.trainer.count / self.config.loop.steps
        if share < recipe.prepare:
            learns = self.model.latents is not None and share < recipe.settle * recipe.prepare
            terms = self.model.prepare(frames, self.jitter(actions, rows) if learns else None)
            self.note(**terms)
            weights = {"alike": recipe.spread}
            return torch.stack([weights.get(k, 1.0) * term for k, term in terms.items()]).sum()
        tokens, done = self.model.encode(frames), self.model.done(frames, actions)
        masked, near = self.masked(tokens, rows), self.near(tokens, rows)
        shown = near.masked_fill(masked, self.model.dynamics.mask)
        before = F.pad(done, (1, 0), value=self.model.dynamics.none)
        past = after(self.model.looks(near))
        return masked_loss(self.model(shown, before, past)[0], tokens, masked, self.share)

    @property
    def hears(self) -> bool:
        return self.model.latents is None

    @property
    def share(self) -> float:
        """Of the tokens of a clip, those that are masked on average."""
        recipe, t = self.recipe, self.data.config.seq_len
        return (1 - recipe.clean) * (1 + recipe.masked) / 2 * (t - 1) / t

    def jitter(self, actions: Tensor, rows: Tensor) -> Tensor:
        """Noise [b, t - 1, k] on the numbers of latent actions."""
        shape = actions.shape[1], len(self.model.config.latent_levels)
        seed = stream_seed(self.config.seed, "noise")
        return self.recipe.jitter * normal(seed, rows, (2,), shape)

    def masked(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Which tokens [b, t, s] are: of the first frame none, of others none, or a share."""
        recipe, seed = self.recipe, stream_seed(self.config.seed, "noise")
        t, s = tokens.shape[1:]
        which, share = even(seed, rows, (0,), (2, t)).unbind(1)
        share = recipe.masked + (1 - recipe.masked) * share
        share = torch.where(which < recipe.clean, 0.0, share)
        share[:, 0] = 0.0
        return even(seed, rows, (1,), (t, s)) < share[..., None]

    def near(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """The tokens [b, t, s], some of whose numbers are a level off: in every frame a share of
        its own, between none and `recipe.blur`."""
        recipe, seed = self.recipe, stream_seed(self.config.seed, "noise")
        levels, (t, s) = self.model.config.levels, tokens.shape[1:]
        share = recipe.blur * even(seed, rows, (3,), (t, 1, 1))
        which, way = even(seed, rows, (4,), (2, t, s, len(levels))).unbind(1)
        by = torch.where(which < share, torch.where(way < 0.5, -1, 1), 0)
        return moved(tokens, by, levels)

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        if self.model.latents is None:
            return super().evaluate(final)
        clips = self.data.bank(self.recipe.labelled, self.data.config.seq_len)
        frames = self.watch(clips)
        actions = torch.from_numpy(clips.actions).to(frames.device)
        if self.recipe.blind:
            actions = torch.zeros_like(actions)
        with self.whole_model():
            done = self.model.done(frames, actions)
        met = together(actions, done, self.model.actions, self.model.told)
        self.model.named.copy_(torch.from_numpy(met.argmax(1)))
        common = normalized_mutual_info_score(*(x.flatten().cpu().numpy() for x in (actions, done)))
        found = {"nmi": float(common), "used": float((met.sum(0) > 0).mean())}
        return super().evaluate(final) | {f"eval/latents/{k}": v for k, v in found.items()}


def masked_loss(logits: Tensor, tokens: Tensor, masked: Tensor, share: float) -> Tensor:
    """Cross-entropy of the masked tokens, a mean where `share` of all are.

    Not of as many as there happen to be: the gradients of processes could not be averaged then.
    """
    each = F.cross_entropy(logits.flatten(0, 2).float(), tokens.flatten(), reduction="none")
    return (each * masked.flatten()).mean() / share


def together(first: Tensor, second: Tensor, rows: int, columns: int) -> np.ndarray:
    """How often numbers of `first` and `second` [...] are found in the same place."""
    found = torch.bincount((first * columns + second).flatten(), minlength=rows * columns)
    return found.reshape(rows, columns).cpu().numpy()


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_world(config, "genie")
    check_clips(config)
    model, data = config.model, config.data
    assert isinstance(model, GenieConfig)
    if model.latent_levels and isinstance(data, PlayedConfig) and data.parts:
        raise UserError(
            f"data={data.name}: its actions are too many to be named by latent ones one by one; "
            "give model.latent_levels=[], which tells the dynamics the true ones"
        )
    places = (data.image_size // model.patch) ** 2  # type: ignore[attr-defined]
    if model.steps > places:
        raise UserError(
            f"model.steps={model.steps} must be at most {places}, the patches of a frame: lower "
            "it, or model.patch"
        )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> GenieTraining:
    """The recipe of `config` with its data, its model initialised on `device`."""
    check(config)
    flops = estimate(config).flops_per_step
    data = open_world_data(config, processes)
    return GenieTraining(config, data, processes, device, flops)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run, from the meta device: of the steps in which the dynamics learns."""
    check(config)
    with torch.device("meta"):
        model = Genie(fill_shapes(config))
    x, actions = clips_on_meta(config)

    def loss() -> Tensor:
        with torch.no_grad():
            tokens, done = model.encode(x), model.done(x, actions)
        past = after(model.looks(tokens))
        return model(tokens, F.pad(done, (1, 0)), past)[0].square().mean()

    return world_estimate(config, model, loss)
