"""A scene from images whose cameras are known: `recipe=gaussian_splatting`.

3D Gaussian Splatting for Real-Time Radiance Field Rendering (2023, arXiv:2308.04079). One step:

    image  = rasterize(Gaussians, a camera that is trained on)
    loss   = (1 - w) |image - truth| + w (1 - SSIM)     + the weights of MCMC's terms
    Adam, with a rate for each kind of number; that of means falls exponentially, and is in units of
    the scene's extent; so do those of cameras and light, if they are corrected
    from time to time Gaussians are added and removed: density.py, mcmc.py

What differs: the number of Gaussians has a limit, `model.capacity`; those that are pulled at most
have the room that there is. Degrees, refinement and removals come at shares of the run, so that a
short one has all of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.worlds.splats.config import Beginning, GaussianSplattingConfig
from models.worlds.splats.density import densify
from models.worlds.splats.gaussian_splatting import GaussianSplatting
from models.worlds.splats.gaussians import Edit, Fields, begin
from models.worlds.splats.mcmc import relocate, stir
from models.worlds.splats.ssim import ssim
from training import formats
from training.data.config_scenes import PosedConfig
from training.data.posed import PosedData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate
from training.evaluation.scenes import judge
from training.exchange import write_model
from training.files import write_atomic
from training.formats.gaussians import Splats, splats_of
from training.recipes.config import check_parts
from training.recipes.config_scenes import Density, GaussianSplattingRecipeConfig
from training.scenes import SCENES, scene_data
from training.schedules import lr_scale
from training.schema import Optimiser, TrainConfig
from training.seeding import torch_generator

FRAMEWORK = "torch"
FALLING = "means", "twists", "exposures"
"Whose learning rates fall."
RESET = 0.01
"Opacity that a reset leaves, at most."


class SplatTraining:
    """Fits Gaussians to the images of one scene."""

    framework = FRAMEWORK
    unit = "images"
    remedy = "Lower optim.lr"
    alarm: str | None = None
    flops_per_step = 0.0

    def __init__(self, config: TrainConfig, data: PosedData[Any], device: torch.device) -> None:
        assert isinstance(config.recipe, GaussianSplattingRecipeConfig)
        assert isinstance(config.model, GaussianSplattingConfig)
        self.config, self.recipe, self.data, self.device = config, config.recipe, data, device
        self.units_per_step, self.steps, self.count = data.config.batch_size, config.loop.steps, 0
        corrected = self.recipe.poses_lr > 0 or self.recipe.exposures_lr > 0
        views = len(data.train.names) if corrected else 0
        self.model = self.begun(views).to(device)
        self.gaussians = self.model.gaussians
        self.background = torch.tensor(data.background, device=device)
        self.pull, self.shown = (torch.zeros(config.model.capacity, device=device) for _ in "ab")
        self.place_first()
        self.optimiser = self.rates()
        self.found: dict[str, Any] = {}
        self.figures: dict[str, str] = {}

    def begun(self, views: int) -> GaussianSplatting:
        """The model, without Gaussians; so many images have corrections of their own."""
        assert isinstance(self.config.model, GaussianSplattingConfig)
        return GaussianSplatting(self.config.model, views)

    def place_first(self) -> None:
        """Gaussians at the points that came with the images, or anywhere in the scene's box."""
        model, data = self.config.model, self.data
        assert isinstance(model, GaussianSplattingConfig)
        if model.begin == Beginning.cloud:
            if data.cloud is None:
                raise UserError(
                    f"model.begin=cloud: data={data.config.name} comes without points, use random"
                )
            points, colors = (torch.from_numpy(x) for x in (data.cloud.points, data.cloud.colors))
            points, colors = points[: model.capacity], colors[: model.capacity]
        else:
            generator = torch_generator(self.config.seed, "init")
            low, high = torch.from_numpy(data.box)
            share, colors = torch.rand(2, model.begin_count, 3, generator=generator)
            points = low + share * (high - low)
        first = begin(points, colors, model.begin_opacity, model.degree, model.begin_scale)
        first |= self.more_of(len(points))
        self.gaussians.apply_edit(Edit(torch.zeros(0, dtype=torch.long), first))

    def more_of(self, n: int) -> Fields:
        """What else n Gaussians have at the beginning."""
        return {}

    def rates(self) -> torch.optim.Adam:
        """Adam with the paper's groups; a batch of B images takes sqrt(B) times as large steps."""
        recipe, wider = self.recipe, math.sqrt(self.data.config.batch_size)
        rates = {
            "means": self.config.optim.lr * self.data.extent, "scales": recipe.scales_lr,
            "opacities": recipe.opacities_lr, "quats": recipe.quats_lr, "sh0": recipe.colors_lr,
            "shN": recipe.directions_lr,
        }  # fmt: skip
        groups = [
            {"params": [getattr(self.gaussians, name)], "lr": rate * wider, "name": name}
            for name, rate in rates.items()
        ]
        extra = {"twists": recipe.poses_lr, "exposures": recipe.exposures_lr}
        groups += [
            {"params": [getattr(self.model, name)], "lr": rate, "name": name}
            for name, rate in extra.items()
            if rate
        ]
        groups += self.more_rates()
        for group in groups:
            group["peak"] = group["lr"]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-15)
        for group in groups:  # zeros, so that there is something to load into
            for parameter in group["params"]:
                optimiser.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return optimiser

    def more_rates(self) -> list[dict[str, Any]]:
        """Groups of parameters that others have."""
        return []

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        recipe, images = self.recipe, self.on_device(batch["images"])
        _, height, width, _ = images.shape
        falling = self.falling
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate_of(group, falling)
        absolute = recipe.density == Density.absolute
        probe = torch.zeros(len(images), self.gaussians.count, 2, device=self.device)
        views = self.on_device(batch["rows"]) if len(self.model.twists) else None
        seen = self.model(
            self.on_device(batch["viewmats"]), self.on_device(batch["Ks"]), width, height,
            background=self.background, degree=self.degree, views=views,
            probe=probe.requires_grad_() if absolute else None, time=self.time(batch),
        )  # fmt: skip
        seen.projected.centers.retain_grad()
        color = self.model.exposed(seen.color, views)
        error, alike = (color - images).abs().mean(), ssim(color, images)
        loss = (1 - recipe.ssim_weight) * error + recipe.ssim_weight * (1 - alike)
        fields = self.gaussians.fields()
        if recipe.opacity_weight:
            loss = loss + recipe.opacity_weight * fields["opacities"].sigmoid().mean()
        if recipe.scale_weight:
            loss = loss + recipe.scale_weight * fields["scales"].exp().mean()
        loss = loss + self.penalty(fields)
        loss.backward()
        pulled = probe.grad if absolute else seen.projected.centers.grad
        assert pulled is not None
        self.remember(pulled, seen.projected.extents, width, height)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.count += 1
        self.refine()
        self.after()
        return {"train/loss": loss.detach(), "train/gaussians": float(self.gaussians.count),
                "train/pairs": float(seen.pairs), "opt/lr": falling}  # fmt: skip

    def time(self, batch: dict[str, np.ndarray]) -> float | None:
        """Of the images; None where nothing moves."""
        return None

    def penalty(self, fields: Fields) -> Tensor | float:
        """What the loss has besides."""
        return 0.0

    def after(self) -> None:
        """What a step ends with."""

    def rate_of(self, group: dict[str, Any], falling: float) -> float:
        """Learning rate of a group in the step in hand."""
        return group["peak"] * (falling if group["name"] in FALLING else 1.0)

    @property
    def falling(self) -> float:
        """What rates are multiplied with that fall."""
        return lr_scale(self.config.optim, self.count, self.steps)

    @property
    def share(self) -> float:
        """Of the steps in which there may be more Gaussians."""
        return self.count / self.steps

    @property
    def degree(self) -> int:
        """Of the harmonics that are looked at by now."""
        assert isinstance(self.config.model, GaussianSplattingConfig)
        every, degree = self.recipe.degree_every, self.config.model.degree
        return min(degree, int(self.share / every)) if every else degree

    @torch.no_grad()
    def remember(self, pulled: Tensor, extents: Tensor, width: int, height: int) -> None:
        """How much each centre that is seen is pulled at, in half widths of the image, as if every
        image were the only one."""
        n, seen = self.gaussians.count, (extents >= 0).all(-1)  # [c n]
        half = pulled.new_tensor([width / 2, height / 2]) * len(pulled)
        self.pull[:n] += torch.where(seen, (pulled * half).norm(dim=-1), 0.0).sum(0)
        self.shown[:n] += seen.sum(0)

    @torch.no_grad()
    def refine(self) -> None:
        """What the step in hand asks for besides Adam's."""
        recipe, share, n = self.recipe, self.share, self.gaussians.count
        if recipe.density == Density.none:
            return
        generator = torch_generator(self.config.seed, "density", self.count)
        due = recipe.refine_from < share <= recipe.refine_until
        fields = self.gaussians.fields()
        if due and self.count % recipe.refine_every == 0:
            if recipe.density == Density.mcmc:
                target = min(self.gaussians.capacity, math.ceil(recipe.growth * n))
                edit = relocate(fields, target, generator)
            else:
                largest = recipe.largest * self.data.extent
                edit = densify(
                    fields, self.pull[:n] / self.shown[:n].clamp_min(1), self.gaussians.capacity,
                    generator, pull_least=recipe.pull_least, small=recipe.small * self.data.extent,
                    opacity_least=recipe.opacity_least,
                    largest=largest if share > recipe.largest_from else math.inf,
                    revised=recipe.revised,
                )  # fmt: skip
            self.gaussians.apply_edit(edit, self.moments())
            if not self.gaussians.count:
                raise UserError(
                    f"no Gaussian is left after step {self.count}: all were fainter than "
                    f"recipe.opacity_least={recipe.opacity_least:g} or wider than "
                    f"recipe.largest={recipe.largest:g} of the scene; begin with more or smaller "
                    "ones, or change these"
                )
            self.pull.zero_()
            self.shown.zero_()
        if recipe.density == Density.mcmc:
            (rate,) = (g["lr"] for g in self.optimiser.param_groups if g["name"] == "means")
            fields = self.gaussians.fields()
            fields["means"] += stir(fields, recipe.noise * rate, generator)
        elif recipe.reset_every and due and self.count % recipe.reset_every == 0:
            fields = self.gaussians.fields()
            fields["opacities"].clamp_(max=math.log(RESET / (1 - RESET)))
            for name, x in self.optimiser.state[self.gaussians.opacities].items():
                if name != "step":
                    x.zero_()

    def moments(self) -> list[Tensor]:
        """Adam's, of Gaussians: rows go with them."""
        own = {id(p) for p in self.gaussians.parameters()}
        return [
            x
            for parameter, state in self.optimiser.state.items()
            if id(parameter) in own
            for name, x in state.items()
            if name != "step"
        ]

    def on_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device)

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Held-out views: how alike, how deep; floors, at the end."""
        agree = self.recipe.agreement
        found, self.found, figure = judge(self.model, self.data, self.device, final, agree)
        self.figures = {"views": figure} if figure else {}
        found["gaussians"] = float(self.gaussians.count)
        return {f"eval/{name}": value for name, value in found.items()}

    def summary(self) -> dict[str, Any]:
        return {"parameters": self.parameters_used, **self.found}

    @property
    def parameters_used(self) -> int:
        return sum(x.numel() for x in self.gaussians.fields().values())

    def export(self, directory: Path) -> None:
        """The Gaussians that there are, for us and for other programs; renders beside the truth."""
        weights = {
            name: x.detach().cpu().contiguous() for name, x in self.gaussians.fields().items()
        } | self.more_weights()
        write_model(directory, weights, self.config.model)
        splats = self.exported(weights)
        for ending in (".ply", ".spz"):
            formats.write(directory / f"scene{ending}", splats)
        for name, figure in self.figures.items():
            write_atomic(directory / "figures" / f"{name}.svg", figure)

    def exported(self, weights: dict[str, Tensor]) -> Splats:
        """What other programs are given."""
        return splats_of(weights)

    def more_weights(self) -> dict[str, Tensor]:
        """What else is left for others to load."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "gaussians": self.gaussians.count,
            "model": {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())},
            "optimiser": {
                name: self.optimiser.state[p]
                for name, p in self.model.named_parameters()
                if p in self.optimiser.state
            },
            "pull": self.pull,
            "shown": self.shown,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.gaussians.count = int(state["count"]), int(state["gaussians"])
        own = self.state_dict()
        for name, tensor in own["model"].items():
            tensor.copy_(state["model"][name])
        for name, values in own["optimiser"].items():
            for key, tensor in values.items():
                tensor.copy_(state["optimiser"][name][key])
        self.pull.copy_(state["pull"])
        self.shown.copy_(state["shown"])


def check(config: TrainConfig) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, ("gaussian_splatting",), (PosedConfig,), ", ".join(SCENES))
    check_optimiser(config)


def check_optimiser(config: TrainConfig) -> None:
    """Raise UserError unless what scenes do not use is left alone."""
    optim = config.optim
    for key, only in (("name", Optimiser.adamw), ("accumulate", 1), ("ema_decay", None)):
        if getattr(optim, key) != only:
            raise UserError(
                f"optim.{key}={getattr(optim, key)}: recipe={config.recipe.name} has an optimiser "
                f"of its own, leave it at {only}"
            )


def build(config: TrainConfig, processes: Processes, device: torch.device) -> SplatTraining:
    """The recipe of `config` with its data, its Gaussians placed on `device`."""
    check(config)
    if processes.world > 1:
        raise UserError("scale.devices: recipe=gaussian_splatting runs in one process, set it to 1")
    return SplatTraining(config, scene_data(config.data, seed=config.seed), device)


def estimate(config: TrainConfig) -> Estimate:
    """Sizes of the run with all the Gaussians there may be. No data is read."""
    check(config)
    assert isinstance(config.model, GaussianSplattingConfig)
    with torch.device("meta"):
        model = GaussianSplatting(config.model)
    return estimate_of(model, config)


def estimate_of(model: GaussianSplatting, config: TrainConfig) -> Estimate:
    """Of a model with all the Gaussians there may be."""
    count = sum(p.numel() for p in model.parameters())
    memory = {"weights": 4 * count, "gradients": 4 * count, "optimiser": 8 * count}
    return Estimate(count, 0.0, config.data.batch_size, SplatTraining.unit, memory)
