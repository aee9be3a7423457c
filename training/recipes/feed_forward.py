"""What models that see a scene once have in common: `recipe=mvsplat`, `recipe=lvsm`.

One step, of scenes of which two views are given and a third is known:

    loss = mean (model(two views, all cameras) - third view)^2

What differs from both papers: no perceptual loss, as it asks for a network that was trained on
photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.data.config_scenes import RandomTablesConfig
from training.data.random_tables import CONTEXT, RandomTablesData
from training.distributed import Processes
from training.errors import UserError
from training.estimate import Estimate, rows_at_once, torch_estimate
from training.evaluation.glimpses import judge
from training.exchange import write_model
from training.files import write_atomic
from training.recipes.config import check_parts
from training.schema import TrainConfig
from training.seeding import torch_generator
from training.torch_step import Batch, TorchStep, build_on


class FeedForwardTraining:
    """Trains a model(images, viewmats, Ks) -> the view that is asked for."""

    framework = "torch"
    unit = "scenes"
    remedy = "Lower optim.lr, or set optim.clip_norm"
    alarm: str | None = None

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        device: torch.device,
        make: Callable[[], nn.Module],
        flops_per_step: float,
    ) -> None:
        assert isinstance(config.data, RandomTablesConfig)
        self.config, self.processes, self.flops_per_step = config, processes, flops_per_step
        self.data = RandomTablesData(
            config.data, seed=config.seed, rank=processes.rank, world=processes.world
        )
        self.units_per_step = config.data.batch_size
        generator = torch_generator(config.seed, "init", device=device)
        self.model: Any = build_on(device, make, lambda model: model.initialise(generator))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        blocks = list(getattr(self.model, "blocks", []))
        self.trainer = TorchStep(
            self.model, blocks, config.optim, config.scale, processes, config.loop.steps
        )
        self.found: dict[str, Any] = {}
        self.figures: dict[str, str] = {}

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        self.model.train()
        return self.trainer.update(batch, self.loss)

    def loss(self, batch: Batch) -> Tensor:
        images = batch["images"]
        told = self.model(images[:, :CONTEXT], batch["viewmats"], batch["Ks"])
        return (told - images[:, CONTEXT]).square().mean()

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Scenes that are held out; floors, and the wrong camera."""
        self.model.eval()
        held, device = self.data.heldout, self.trainer.device
        with self.trainer.averaged_weights():
            found, self.found, figure = judge(self.model, held, device, final)
        self.figures = {"views": figure} if figure else {}
        return {f"eval/{name}": value for name, value in found.items()}

    def summary(self) -> dict[str, Any]:
        return {"parameters": self.parameters, **self.found}

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        weights = self.trainer.full_weights()
        if self.processes.is_main:
            write_model(directory, weights, self.model.config)
            for name, figure in self.figures.items():
                write_atomic(directory / "figures" / f"{name}.svg", figure)

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)


def check_glimpses(config: TrainConfig, model: str, patch: int = 1) -> None:
    """Raise UserError unless recipe, model and data belong together."""
    check_parts(config, (model,), (RandomTablesConfig,), "random_tables")
    assert isinstance(config.data, RandomTablesConfig)
    if config.data.image_size % patch:
        raise UserError(
            f"data.image_size={config.data.image_size} must be a multiple of model.patch={patch}"
        )


def estimate_glimpses(
    config: TrainConfig, make: Callable[[], nn.Module], told: Callable[[Any, Tensor, Tensor], Any]
) -> Estimate:
    """Sizes of the run, from the meta device.

    Args:
        told: what of a model is run on images and cameras; rasterising has no sizes on meta.
    """
    assert isinstance(config.data, RandomTablesConfig)
    rows, size = rows_at_once(config), config.data.image_size
    with torch.device("meta"):
        model = make()
        images = torch.zeros(rows, CONTEXT, size, size, 3)
        viewmats = torch.zeros(rows, CONTEXT + 1, 4, 4)

    def loss() -> Tensor:
        return told(model, images, viewmats)

    units, unit = config.data.batch_size, FeedForwardTraining.unit
    return torch_estimate(model, loss, rows, config, units, unit)
