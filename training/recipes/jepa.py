"""What recipes of joint-embedding predictive architectures share: loss, targets, live diagnostics.

    loss = pred_weight mean (predicted - target)^2  +  terms of recipe.regularizer

A recipe gives `latents(batch)`: what is seen, what was predicted, what it should have been. The
rest is one switch, for images, videos and worlds that are acted in:

    none      nothing: the control that collapses
    ema       the target is an average of the encoder's past, without a gradient
    vicreg    std_weight hinge on standard deviations + cov_weight squared covariances
    vc_idm    those + time_weight time similarity + idm_weight inverse dynamics
    sigreg    sigreg_weight SIGReg, of each time step over the batch

The statistics are over batch and time together but for SIGReg's, and over all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.worlds.initialise import init_uniform
from models.worlds.jepa.diagnostics import alarm, diagnose, spectrum
from models.worlds.jepa.regularizers import (
    hinge_std,
    inverse_dynamics,
    moments,
    off_diagonal,
    time_similarity,
)
from models.worlds.jepa.sigreg import directions, sigreg
from models.worlds.jepa.targets import Latents, decay_at, follow
from training.distributed import Processes
from training.errors import RunStopped, UserError
from training.exchange import write_model
from training.protocols import Data
from training.recipes.config_worlds import JEPARecipeConfig, Regularizer, Target
from training.schema import Optimiser, TrainConfig
from training.seeding import stream_seed, torch_generator
from training.torch_step import Batch, TorchStep, build_on

FRAMEWORK = "torch"
BatchNorm = nn.modules.batchnorm._BatchNorm
PER_EXAMPLE = Regularizer.none, Regularizer.ema  # no statistics of a batch


class JEPATraining:
    """Trains encoder and predictor; a recipe adds what is seen and how the model is judged.

    Args:
        build: the model, on whatever device is current. It has `encoder`, and `average`, a copy of
            it, where the target is one.
        frames_per_step: images per step of all processes.
    """

    framework = FRAMEWORK
    unit = "frames"
    remedy = "Lower optim.lr, or set optim.clip_norm"
    flops_per_step: float = 0.0

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        processes: Processes,
        device: torch.device,
        build: Callable[[], nn.Module],
        frames_per_step: int,
    ) -> None:
        assert isinstance(config.recipe, JEPARecipeConfig)
        if config.optim.name == Optimiser.muon:
            raise UserError(
                f"recipe={config.recipe.name} has no blocks whose matrices Muon could take: use "
                "optim=adamw"
            )
        if config.optim.accumulate > 1 and config.recipe.regularizer not in PER_EXAMPLE:
            raise UserError(
                f"optim.accumulate={config.optim.accumulate}: the terms of "
                f"recipe.regularizer={config.recipe.regularizer} are statistics of the whole "
                "batch, parts of it have others; set optim.accumulate=1"
            )
        self.config, self.objective, self.data = config, config.recipe, data
        self.processes, self.units_per_step = processes, frames_per_step
        self.model = self.together(build_on(device, build, self.initialise))
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.trainer = TorchStep(
            self.model, [], config.optim, config.scale, processes, config.loop.steps
        )
        self.terms: dict[str, Tensor] = {}
        self.alarm: str | None = None
        self.found: dict[str, Any] = {}

    def together(self, model: nn.Module) -> nn.Module:
        """The model with batch statistics that are of all processes."""
        if self.processes.world == 1 or not any(isinstance(m, BatchNorm) for m in model.modules()):
            return model
        if next(model.parameters()).device.type != "cuda":
            raise UserError(
                f"the model normalises over the batch, and {self.processes.world} processes "
                "without GPUs cannot share its statistics: use one process, or "
                "a model without BatchNorm (recipe=lejepa: encoder.kind=conv, projector=[])"
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def initialise(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        init_uniform(model, torch_generator(self.config.seed, "init", device=device))
        if self.objective.resolved_target == Target.ema:
            follow(model.average, model.encoder, 0.0)

    def latents(self, batch: Batch) -> tuple[Latents, Tensor | None]:
        """What the model makes of a batch, and the actions in it."""
        raise NotImplementedError

    def step(self, batch: dict[str, np.ndarray]) -> dict[str, Tensor | float]:
        self.model.train()
        seed, count = self.config.seed, self.trainer.count
        torch.manual_seed(stream_seed(seed, "dropout", count, self.processes.rank))
        self.terms = {}
        metrics = self.trainer.update(batch, self.loss)
        if self.objective.resolved_target == Target.ema:
            count, steps = self.trainer.count, self.config.loop.steps
            decay = decay_at(count, steps, self.objective.ema_decay)
            follow(self.model.average, self.model.encoder, decay)
        terms = {f"train/{name}": self.trainer.mean(value) for name, value in self.terms.items()}
        return {**metrics, **terms}

    def loss(self, batch: Batch) -> Tensor:
        """The weighted terms of one batch."""
        latents, actions = self.latents(batch)
        constant = self.objective.resolved_target != Target.grad
        target = latents.target.detach() if constant else latents.target
        terms = {"pred": self.prediction_error(latents.predicted, target)}
        terms |= self.regularize(latents, actions)
        for name, value in terms.items():  # the mean over the parts of a batch
            part = value.detach() / self.config.optim.accumulate
            self.terms[name] = self.terms.get(name, 0.0) + part
        weights = {name: getattr(self.objective, f"{name}_weight") for name in terms}
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    def prediction_error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean square; a recipe whose paper has another distance overrides this."""
        return (predicted - target).float().square().mean()

    def regularize(self, latents: Latents, actions: Tensor | None) -> dict[str, Tensor]:
        """The terms of recipe.regularizer, without their weights."""
        kind, z, terms = self.objective.regularizer, latents.z, {}
        everyone = {"all_mean": self.all_mean, "world": self.processes.world}
        if kind in (Regularizer.vicreg, Regularizer.vc_idm):
            covariance = moments(z.flatten(0, 1), **everyone)
            terms |= {"std": hinge_std(covariance), "cov": off_diagonal(covariance)}
        if kind == Regularizer.vc_idm:
            assert latents.told is not None and actions is not None
            terms["time"] = time_similarity(z)
            terms["idm"] = inverse_dynamics(latents.told, actions)
        if kind == Regularizer.sigreg:
            seed, count = self.config.seed, self.trainer.count
            generator = torch_generator(seed, "sigreg", count, device=z.device)
            axes = directions(z.shape[-1], self.objective.directions, generator, z.device)
            terms["sigreg"] = sigreg(z.transpose(0, 1), axes, **everyone)
        return terms

    def all_mean(self, value: Tensor) -> Tensor:
        """The mean over the processes; its gradient is that of this process's own part.

        Gradients are averaged over the processes afterwards, which makes them those of the mean.
        """
        return value + (self.trainer.mean(value.detach().clone()) - value.detach())

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Inside, the model has its (averaged) weights in full, in every process."""
        self.model.eval()
        with self.trainer.averaged_weights(), ExitStack() as stack:
            if self.trainer.sharded:
                self.model.unshard()
                stack.callback(self.model.reshard)
                stack.enter_context(self.trainer.autocast())  # its weights are what FSDP has
            yield

    def health(self, z: Tensor, **more: float) -> dict[str, float]:
        """Diagnostics of held-out latents [n, d], and the alarm they ring."""
        found = {**diagnose(z), **more}
        self.found["series"] = {"spectrum": spectrum(z).tolist()}
        self.alarm = alarm(found)
        if self.alarm and self.objective.stop_on_collapse and self.trainer.count:
            raise RunStopped(f"after step {self.trainer.count}: {self.alarm}")
        return {f"eval/{name}": value for name, value in found.items()}

    def summary(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "alarm": self.alarm, **self.found}

    def export(self, directory: Path) -> None:
        """Write model.safetensors and model.json, for exchange."""
        weights = self.trainer.full_weights()
        if self.processes.is_main:
            write_model(directory, weights, self.model_config)

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)
