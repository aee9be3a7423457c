"""A pushed table that is seen by cameras and no more: poses are found in images, and told on.

Of windows of held-out episodes in which something is pushed. Where things stand is said once, a few
centimetres and degrees wrong; from then on poses are those that make renders most like the images,
each begun where the one before leads. Then the model goes on alone, and at the end:

    found       metres between poses found in images and true ones, mean over things and times;
                said: before the first image
    seen/error  metres off after `ahead` steps of things that went further than a threshold; seen/
                stayed: of those if they had stayed where they were found, share: of this
    psnr        of renders of the last state, where images changed; copied: of the images that were
                seen last; flat: of the one colour that is best for these pixels
    blind       metres off of what moved most, after BLIND steps without any image; blind/stayed: if
                it had stayed where it was seen last
    again       of the same, found in the first image after them from where it was told to be;
                again/lost: found from where it was seen last
    revisited   share of pixels that are the same bits when cameras come back from where others are
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kernels.splats.op import rasterize
from models.worlds.splats.mro_gwm import MroGwm, PushHistory
from models.worlds.splats.rigid import product
from training.data.push_world import Episodes
from training.envs.push_world import DT, THINGS, PushState, push_scene
from training.envs.ray_tracer import Scene, Views, intrinsics, render
from training.envs.tabletop import FOCAL, cameras_around
from training.evaluation.pushing import cut, off
from training.evaluation.scene_figures import film_beside_truth
from training.object_scenes import PushScene, with_pusher
from training.recipes.config_scenes import MroGwmRecipeConfig
from training.seeding import numpy_rng

WRONG_BY, WRONG_ANGLE = 0.03, 0.1  # metres and radians, standard deviations of what is said first
BLIND = 5  # steps without an image
CHANGED = 0.1


@dataclass
class Watching:
    """What was found."""

    metrics: dict[str, float]
    figures: dict[str, str]
    poses: Float[Tensor, "t n 7"]
    "Of things and pusher in the first window: found first, then told."


@dataclass(frozen=True)
class Cameras:
    """Who watches."""

    viewmats: Float[Tensor, "c 4 4"]
    Ks: Float[Tensor, "c 3 3"]
    size: int

    def trace(self, scene: Scene) -> Views:
        """What they truly see."""
        return render(scene, self.viewmats, self.Ks, self.size, self.size, samples=2)

    def draw(
        self, scene: PushScene, poses: Float[Tensor, "m 7"], pusher: Float[Tensor, " 2"]
    ) -> Float[Tensor, "c h w 3"]:
        """What Gaussians show them."""
        background = torch.tensor(scene.background, device=poses.device)
        return rasterize(
            **scene.at(poses, pusher), viewmats=self.viewmats, Ks=self.Ks, width=self.size,
            height=self.size, background=background, antialiased=scene.antialiased,
            tile=scene.tile,
        ).color  # fmt: skip


def watched(
    model: MroGwm, scene: PushScene, episodes: Episodes, recipe: MroGwmRecipeConfig, seed: int,
    device: torch.device,
) -> Watching:  # fmt: skip
    """Metrics over one window each of the episodes in which most is pushed, and a film of one."""
    h, ahead, rng = model.config.history, recipe.ahead, numpy_rng(seed, "eval/watched")
    windows = cut(episodes, h, ahead)
    pushed = np.linalg.norm(windows.poses[:, -1, :, :2] - windows.poses[:, h - 1, :, :2], axis=-1)
    size = recipe.image_size
    cameras = Cameras(
        cameras_around(rng, recipe.cameras).to(device),
        intrinsics(FOCAL * size, size, size).expand(recipe.cameras, 3, 3).to(device),
        size,
    )
    each, films, ways = [], [], []
    per = len(pushed) // len(episodes.poses)  # windows of an episode
    best = pushed.max(-1).reshape(-1, per)
    for episode in np.argsort(-best.max(1))[: recipe.tracked]:
        row = per * episode + best[episode].argmax()
        one = windows.windows(np.array([row]), np.array([0]), h + ahead)
        found, film, poses = followed(model, scene, one, cameras, recipe, rng)
        each.append(found)
        films.append(film)
        ways.append(with_pusher(poses, torch.from_numpy(one.pusher[0]).to(poses)))
    names = {name: [x[name] for x in each if name in x] for x in each for name in x}
    metrics = {name: float(np.mean(values)) for name, values in names.items()}
    if "seen/error" in metrics:
        metrics["seen/share"] = metrics["seen/error"] / metrics["seen/stayed"]
    return Watching(metrics, {"film": films[0]}, ways[0])


def followed(
    model: MroGwm, scene: PushScene, one: Episodes, cameras: Cameras, recipe: MroGwmRecipeConfig,
    rng: np.random.Generator,
) -> tuple[dict[str, float], str, Float[Tensor, "t m 7"]]:  # fmt: skip
    """One window: metrics, a film, and poses, found and told."""
    h, device = model.config.history, cameras.Ks.device
    true, pusher, actions = (
        torch.from_numpy(x[0]).to(device) for x in (one.poses, one.pusher, one.actions)
    )
    states = [PushState(p, x) for p, x in zip(one.poses[0], one.pusher[0], strict=True)]
    images = [cameras.trace(push_scene(state)).color for state in states]
    wrong = torch.from_numpy(rng.normal(size=(THINGS, 6)).astype(np.float32)).to(device)
    said = stirred(true[0], WRONG_BY * wrong[:, :3], WRONG_ANGLE * wrong[:, 3:])
    poses = [said]
    for t in range(h):
        start = poses[-1] if t < 2 else on(poses[-2], poses[-1])
        poses.append(found_in(scene, start, pusher[t], images[t], cameras, recipe))
    poses = poses[1:]
    seen = PushHistory(torch.stack(poses)[None], pusher[None, :h])
    with torch.no_grad():
        told = model.imagine(seen, actions[None, h - 1 :], pusher[None, h:])[0][0]
        drawn = [cameras.draw(scene, told[t], pusher[h + t]) for t in range(len(told))]
        elsewhere = replace(cameras, viewmats=cameras.viewmats.roll(1, 0))
        trip = [x.draw(scene, told[-1], pusher[-1]) for x in (cameras, elsewhere, cameras)]
    went = off(true[-1], true[h - 1])
    far = went > recipe.moved
    changed = ((images[-1] - images[h - 1]).abs() > CHANGED).any(-1)
    found = {
        "found": off(torch.stack(poses), true[:h]).mean(),
        "found/said": off(said, true[0]).mean(),
        "psnr": decibels(drawn[-1], images[-1], changed),
        "psnr/copied": decibels(images[h - 1], images[-1], changed),
        "psnr/flat": decibels(images[-1][changed].mean(0), images[-1], changed),
        "revisited": (trip[0] == trip[2]).float().mean(),
    }
    if far.any():
        found["seen/error"] = off(told[-1], true[-1])[far].mean()
        found["seen/stayed"] = off(poses[-1], true[-1])[far].mean()
    then = h - 1 + BLIND  # when they look again
    most = int(off(true[then], true[h - 1]).argmax())
    for name, start in (("again", told[BLIND - 1]), ("again/lost", poses[-1])):
        seen_again = found_in(scene, start, pusher[then], images[then], cameras, recipe)
        found[name] = off(seen_again, true[then])[most]
    found |= {
        "blind": off(told[BLIND - 1], true[then])[most],
        "blind/stayed": off(poses[-1], true[then])[most],
    }
    times = np.linspace(0, len(told) - 1, 5).round().astype(int)
    rows = (
        torch.stack([x[0].clamp(0, 1) for x in kind]).cpu().numpy()
        for kind in ([images[h + t] for t in times], [drawn[t] for t in times],
                     [images[h - 1]] * len(times))
    )  # fmt: skip
    shown = film_beside_truth((times + 1) * DT, *rows, third="seen last")
    way = torch.cat([seen.poses[0], told])
    return {name: float(x) for name, x in found.items()}, shown, way


def found_in(
    scene: PushScene, start: Float[Tensor, "m 7"], pusher: Float[Tensor, " 2"],
    images: Float[Tensor, "c h w 3"], cameras: Cameras, recipe: MroGwmRecipeConfig,
) -> Float[Tensor, "m 7"]:  # fmt: skip
    """Poses whose renders are like the images, searched from `start` on."""
    by = torch.zeros(len(start), 6, device=start.device, requires_grad=True)
    optimiser = torch.optim.Adam([by], recipe.tracking_lr)
    steps = recipe.tracking_steps
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for _ in range(steps):
            poses = stirred(start, by[:, :3], by[:, 3:])
            error = (cameras.draw(scene, poses, pusher) - images).abs().mean()
            optimiser.zero_grad()
            error.backward()
            optimiser.step()
            fall.step()
    return stirred(start, by[:, :3], by[:, 3:]).detach()


def stirred(
    poses: Float[Tensor, "m 7"], move: Float[Tensor, "m 3"], turn: Float[Tensor, "m 3"]
) -> Float[Tensor, "m 7"]:
    """Moved, and turned about their own middle by vectors of radians that are small."""
    small = torch.cat([torch.ones_like(turn[:, :1]), turn / 2], dim=-1)
    q = product(torch.nn.functional.normalize(small, dim=-1), poses[:, 3:])
    return torch.cat([poses[:, :3] + move, q], dim=-1)


def on(before: Float[Tensor, "m 7"], now: Float[Tensor, "m 7"]) -> Float[Tensor, "m 7"]:
    """As far again in place."""
    return torch.cat([2 * now[:, :3] - before[:, :3], now[:, 3:]], dim=-1)


def decibels(told: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """PSNR over some pixels."""
    return -10 * (told - truth).square().mean(-1)[where].mean().clamp_min(1e-10).log10()
