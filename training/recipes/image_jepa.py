"""What recipes of image encoders share: views of a batch, probes of frozen latents, pictures.

Judged on images that were held out, each seen in several views: a linear classifier is fitted to
latents of training images and has to name the classes of the others. Beside it the same classifier
on the pixels. Nothing of this reaches the encoder.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.data.config_worlds import ImagesConfig
from training.data.hub_images import HubImagesData
from training.data.images import Exam, ImageData
from training.data.small_images import SmallImagesData
from training.data.views import show
from training.distributed import Processes
from training.evaluation.image_figures import neighbours_chart, scatter_chart, views_chart
from training.evaluation.probes import accuracy, logistic_probe, nearest_accuracy
from training.files import write_atomic
from training.recipes.config_worlds import ImageJEPARecipeConfig
from training.recipes.jepa import JEPATraining
from training.schema import TrainConfig
from training.torch_step import Batch

DATA = {"small_images": SmallImagesData, "hub_images": HubImagesData}
CHUNK = 512  # images that are encoded at once
DRAWN = 600  # images of the scatter of latents
SHOWN, NEAREST = 6, 7  # images whose views, and whose neighbours, are drawn


def open_images(config: TrainConfig, processes: Processes) -> ImageData:
    """The data that a run's configuration names."""
    kind = DATA[config.data.name]
    return kind(config.data, seed=config.seed, rank=processes.rank, world=processes.world)


def channels_of(config: ImagesConfig) -> int:
    """Channels of the images, before any is read."""
    return DATA[config.name].channels


class ImageJEPATraining(JEPATraining):
    """A recipe adds `embed` and `latents`."""

    unit = "images"
    data: ImageData
    recipe: ImageJEPARecipeConfig

    def embed(self, images: Tensor) -> Tensor:
        """[n, c, s, s] normalised images -> [n, d] latents, as a probe reads them."""
        raise NotImplementedError

    def loss_space(self, images: Tensor) -> Tensor:
        """[n, c, s, s] normalised images -> [n, d] latents, as the loss sees them."""
        raise NotImplementedError

    def see(self, batch: Batch, prefix: str = "") -> Tensor:
        """[b, v, c, s, s] views, normalised over the training images."""
        parts = (batch[f"{prefix}{name}"] for name in ("where", "light", "hole", "noise"))
        return self.normalise(show(batch["images"].float() / 255, *parts))

    def normalise(self, images: Tensor) -> Tensor:
        mean, std = (
            torch.from_numpy(x).to(images.device)[:, None, None]
            for x in (self.data.mean, self.data.std)
        )
        return (images - mean) / std

    @torch.no_grad()
    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Diagnostics and probe; the floors too, if `final`."""
        (fit, labels), (judge, truth) = self.seen_exam
        with self.whole_model():
            health = self.health(self.in_chunks(self.loss_space, judge))
            known, asked = (self.in_chunks(self.embed, images) for images in (fit, judge))
        classes = len(self.data.names)

        def probe(known: Tensor, asked: Tensor) -> float:
            return accuracy(logistic_probe(known, labels, classes)(asked), truth)

        metrics = {**health, "eval/probe": probe(known, asked)}
        self.judged = asked, truth
        if final:
            metrics["eval/nearest"] = nearest_accuracy(known, labels, asked, truth)
            metrics["eval/pixels"] = probe(fit.flatten(1), judge.flatten(1))
            metrics["eval/chance"] = (truth.bincount().max() / len(truth)).item()
        return metrics

    def in_chunks(self, function, images: Tensor) -> Tensor:
        """A function of images, some at a time."""
        return torch.cat([function(part).float() for part in images.split(CHUNK)])

    @cached_property
    def exam(self) -> Exam:
        return self.data.exam()

    @cached_property
    def seen_exam(self) -> list[tuple[Tensor, Tensor]]:
        """Normalised images and classes of both parts; all views of an image after each other."""
        exam, each, found = self.exam, self.recipe.probe_views, []
        for part, images, labels in ((0, exam[0], exam[1]), (1, exam[2], exam[3])):
            seen = self.to_device(images).float() / 255
            if each:
                views = self.data.exam_views(part, len(images), each)
                seen = show(seen, *(self.to_device(x) for x in views)).flatten(0, 1)
            classes = self.to_device(np.repeat(labels, max(1, each)))
            found.append((self.normalise(seen), classes))
        return found

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.trainer.device)

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """The model, and pictures of what it saw and what it finds alike."""
        super().export(directory)
        if not self.processes.is_main:
            return
        for name, drawn in self.pictures().items():
            write_atomic(directory / "figures" / f"{name}.svg", drawn)

    def pictures(self) -> dict[str, str]:
        """Name -> SVG."""
        each = max(1, self.recipe.probe_views)
        images, (z, truth) = self.exam.other_images, self.judged
        rows = np.linspace(0, len(z) - 1, SHOWN).astype(int)
        unit = torch.nn.functional.normalize(z, dim=-1)
        alike = unit[rows] @ unit.mT  # [shown, n]
        own = torch.arange(len(z), device=z.device) // each
        alike[own == own[rows][:, None]] = -2.0  # not the same image again
        nearest = alike.topk(NEAREST, dim=-1).indices
        seen = self.seen_exam[1][0]
        order = torch.cat([torch.tensor(rows, device=z.device)[:, None], nearest], dim=1)
        shown = seen[order.flatten()].unflatten(0, order.shape).cpu().numpy()
        right = (truth[order] == truth[order[:, :1]]).cpu().numpy()
        few = slice(None, None, max(1, len(z) // DRAWN))
        return {
            "views": self.views_seen(images[:SHOWN]),
            "neighbours": neighbours_chart(shown, right),
            "latents": scatter_chart(
                z[few].cpu().numpy(), truth[few].cpu().numpy(), self.data.names
            ),
        }

    def views_seen(self, images: np.ndarray) -> str:
        """Images, and views of them as in training."""
        drawn = self.data.exam_views(2, len(images), NEAREST)
        source = self.to_device(images).float() / 255
        views = show(source, *(self.to_device(x) for x in drawn))
        return views_chart(torch.cat([source[:, None], views], dim=1).cpu().numpy())
