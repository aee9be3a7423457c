"""Self Forcing: a student of few steps, taught on films that it draws itself.

Self Forcing: Bridging the Train-Test Gap in Autoregressive Video Diffusion, 2025, arXiv:2506.08009,
with the distribution matching of DMD (2023, arXiv:2311.18828). Three models of one kind, all of
which begin as the teacher:

    student    draws a film as it will when it is played: frame by frame, in `steps` steps, beside a
               cache of its own clean frames. All frames end at one step, drawn for the film; a
               gradient flows through that step alone, and none through the cache
    critic     learns to take the noise out of the student's films
    teacher    knows how to take it out of true ones, and does not change

    x_k        = sqrt(abar_k) x + sqrt(1 - abar_k) eps       a film of the student's, at one level
    direction  = (critic(x_k) - teacher(x_k)) / mean |x - teacher(x_k)|           clean films both
    loss       = 1/2 |x - sg(x - direction)|^2,   whose gradient in x is `direction`

What differs: the teacher is causal too (Diffusion Forcing), and there is no guidance of its score.

Dimensions: b films, t frames, of which the first n were seen; c channels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.worlds.video.config import DiffusionForcingConfig
from models.worlds.video.diffusion_forcing import LARGEST, DiffusionForcing
from models.worlds.video.schedules import ddim_levels, noised, snr_weight, told_apart, velocity


class SelfForcing(nn.Module):
    """Student, critic and teacher. As a world it is the student."""

    def __init__(self, config: DiffusionForcingConfig) -> None:
        super().__init__()
        self.config, self.context = config, config.context
        self.student, self.critic, self.teacher = (DiffusionForcing(config) for _ in range(3))
        self.teacher.requires_grad_(False)
        self.critic.outcomes.requires_grad_(False)  # nobody asks it what a step is worth

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """All three alike."""
        self.teacher.initialise(generator)
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Student and critic become what the teacher is."""
        for part in (self.student, self.critic):
            part.load_state_dict(self.teacher.state_dict())

    def roll(
        self,
        seen: Float[Tensor, "b n c h w"],
        before: Int64[Tensor, "b t"],
        noise: Float[Tensor, "b t-n steps c h w"],
        last: int,
    ) -> Float[Tensor, "b t-n c h w"]:
        """The frames that the student draws after some in [-1, 1], all of them at step `last`."""
        n, student, abar = seen.shape[1], self.student, self.student.abar
        noise = noise.clamp(-LARGEST, LARGEST)
        with torch.no_grad():
            cache = student.show(seen, before[:, :n], None, None)
        film, levels = [], list(pairwise(ddim_levels(self.config.steps)))
        for frame in range(noise.shape[1]):
            done, z = before[:, n + frame, None], noise[:, frame, :1]

            def clean(z: Tensor, level: int, done: Tensor = done, cache: Any = cache) -> Tensor:
                v, _ = student(z, torch.full_like(done, level), done, cache)
                return told_apart(z, v, abar[level])[0].clamp(-1, 1)

            with torch.no_grad():
                for step, (now, then) in enumerate(levels[:last]):
                    z = noised(clean(z, now), noise[:, frame, step + 1, None], abar[then])
            film.append(clean(z, levels[last][0]))
            with torch.no_grad():
                cache = student.show(film[-1].detach(), done, None, cache)
        return torch.cat(film, dim=1)

    def told(
        self,
        by: DiffusionForcing,
        seen: Float[Tensor, "b n c h w"],
        film: Float[Tensor, "b m c h w"],
        level: Int64[Tensor, " b"],
        before: Int64[Tensor, "b t"],
    ) -> Float[Tensor, "b m c h w"]:
        """v of a noisy film after clean frames, which are shown as those of the past are."""
        shown, past = by.as_past(seen)
        levels = torch.cat([past, level[:, None].expand(-1, film.shape[1])], dim=1)
        v, _ = by(torch.cat([shown, film], dim=1), levels, before)
        return v[:, seen.shape[1] :]

    def match(
        self,
        seen: Float[Tensor, "b n c h w"],
        film: Float[Tensor, "b m c h w"],
        before: Int64[Tensor, "b t"],
        level: Int64[Tensor, " b"],
        eps: Float[Tensor, "b m c h w"],
    ) -> Float[Tensor, ""]:
        """What the student is to make smaller."""
        with torch.no_grad():
            abar = self.teacher.abar[level][:, None, None, None, None]
            x_k = noised(film, eps, abar)
            real, fake = (told_apart(x_k, self.told(by, seen, x_k, level, before), abar)[0]
                          for by in (self.teacher, self.critic))  # fmt: skip
            size = (film - real).abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
            wanted = film - (fake - real) / size
        return (film - wanted).float().square().mean() / 2

    def doubt(
        self,
        seen: Float[Tensor, "b n c h w"],
        film: Float[Tensor, "b m c h w"],
        before: Int64[Tensor, "b t"],
        level: Int64[Tensor, " b"],
        eps: Float[Tensor, "b m c h w"],
    ) -> Float[Tensor, ""]:
        """The critic's error on a film of the student's."""
        abar = self.critic.abar[level][:, None]
        wide = abar[..., None, None, None]
        v = self.told(self.critic, seen, noised(film, eps, wide), level, before)
        error = (v - velocity(film, eps, wide)).float().square().mean((2, 3, 4))
        return (snr_weight(abar) * error).mean()

    @property
    def run(self) -> Any:
        """How the student's steps are run: see graphs.py."""
        return self.student.run

    @run.setter
    def run(self, run: Any) -> None:
        self.student.run = run

    def init_cache(self, *seen: Any, **more: Any) -> Any:
        return self.student.init_cache(*seen, **more)

    def step(self, cache: Any, action: Tensor) -> tuple[Tensor, Any]:
        return self.student.step(cache, action)

    def outcome(self, *steps: Tensor) -> tuple[Tensor, Tensor]:
        return self.student.outcome(*steps)
