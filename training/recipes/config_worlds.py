"""Configuration of the recipes that learn models of a world. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from training.fields import above, at_least, checkpoint, span, within
from training.recipes.config import RecipeConfig


class Regularizer(StrEnum):
    """What keeps the encoder from collapsing."""

    none = "none"  # nothing: the control
    ema = "ema"  # targets from an average of the weights, without a gradient
    vicreg = "vicreg"  # standard deviation and covariance
    vc_idm = "vc_idm"  # those, time similarity, and the action between two latents
    sigreg = "sigreg"  # random projections are normal


class Target(StrEnum):
    """What a prediction is compared with."""

    grad = "grad"  # the encoder's latent, through which gradients flow
    stopgrad = "stopgrad"  # the same, as a constant
    ema = "ema"  # the latent of the averaged encoder, as a constant


@dataclass
class JEPARecipeConfig(RecipeConfig):
    """What recipes of joint-embedding predictive architectures have in common."""

    tells_actions: ClassVar[bool] = False
    "Whether the model has a network for it."
    regularizer: Regularizer = Regularizer.vicreg
    "none, ema, vicreg, vc_idm or sigreg: which of the weighted terms below there are."
    target: Target | None = None
    "grad, stopgrad or ema; null is ema for regularizer=ema and grad for the others."
    pred_weight: float = 1.0
    "Weight of the prediction error."
    std_weight: float = 25.0
    "Weight of the hinge on the standard deviations (vicreg, vc_idm)."
    cov_weight: float = 1.0
    "Weight of the squared covariances, divided by D (D - 1) (vicreg, vc_idm)."
    time_weight: float = 0.0
    "Weight of the squared step in latent space (vc_idm)."
    idm_weight: float = 1.0
    "Weight of the error in telling the action (vc_idm)."
    sigreg_weight: float = 0.1
    "Weight of SIGReg, times the batch as in LeJEPA and LeWM (sigreg)."
    directions: int = 256
    "Random projections of SIGReg, drawn anew every step."
    ema_decay: float = 0.996
    "Decay per step of the averaged encoder at the beginning; it grows to 1 (ema)."
    stop_on_collapse: bool = False
    "End the run at the first alarm of the diagnostics."

    def __post_init__(self) -> None:
        weights = ("pred", "std", "cov", "time", "idm", "sigreg")
        at_least(self, "recipe", 0, *(f"{name}_weight" for name in weights))
        at_least(self, "recipe", 1, "directions")
        within(self, "recipe", 0.0, 1.0, "ema_decay")
        if self.regularizer == Regularizer.vc_idm and not self.tells_actions:
            raise ValueError(
                "recipe.regularizer=vc_idm needs a network that tells actions, which "
                f"recipe={self.name} has not: use vicreg"
            )
        if self.regularizer == Regularizer.ema and self.target not in (None, Target.ema):
            raise ValueError(
                f"recipe.regularizer=ema has targets of its own: set recipe.target=null, "
                f"not {self.target}"
            )

    @property
    def resolved_target(self) -> Target:
        if self.target is not None:
            return self.target
        return Target.ema if self.regularizer == Regularizer.ema else Target.grad


class PlannerKind(StrEnum):
    cem = "cem"
    icem = "icem"
    mppi = "mppi"
    adam = "adam"


class PlanCost(StrEnum):
    """What of the distances between predicted latents and that of the goal counts."""

    sum = "sum"
    last = "last"


@dataclass
class PlanningConfig:
    """How plans are made."""

    kind: PlannerKind = PlannerKind.cem
    "cem, icem, mppi or adam."
    horizon: int = 40
    "Steps that a plan looks ahead."
    replan: int = 8
    "Steps that are carried out before the next plan."
    samples: int = 150
    "Sequences of actions per iteration."
    elites: int = 10
    "Of which the best so many count (cem, icem)."
    iterations: int = 4
    "Rounds of sampling, or steps of gradient descent."
    std: float = 1.2
    "Of the first samples."
    max_norm: float | None = 1.8
    "Longest action; null for any."
    holds: list[int] = field(default_factory=lambda: [1, 5, 15])
    "Steps for which a sample's noise stays the same; the samples take them in turn."
    fresh: float = 0.3
    "Share of the samples that forget what was found (cem, icem)."
    best: bool = True
    "Carry out the best sequence; else the mean of the elites (cem, icem)."
    temperature: float = 1.0
    "Divides costs (mppi)."
    lr: float = 0.1
    "Step size (adam)."
    cost: PlanCost = PlanCost.sum
    "sum over the horizon, or last."

    def __post_init__(self) -> None:
        keys = ("horizon", "replan", "samples", "elites", "iterations")
        at_least(self, "recipe.planning", 1, *keys)
        within(self, "recipe.planning", 0.0, 1.0, "fresh")
        above(self, "recipe.planning", 0, "std", "max_norm", "temperature", "lr")
        if self.replan > self.horizon:
            raise ValueError(
                f"recipe.planning.replan={self.replan} must not be beyond "
                f"recipe.planning.horizon={self.horizon}: that is all that is planned"
            )
        if self.elites > self.samples:
            raise ValueError(
                f"recipe.planning.elites={self.elites} must not be more than "
                f"recipe.planning.samples={self.samples}"
            )
        if not self.holds or min(self.holds) < 1:
            raise ValueError(f"recipe.planning.holds={self.holds} must be numbers from 1 on")


POLICIES = (
    "model",
    "random",
    "zero",
    "greedy",
    "oracle",
    "true_dynamics",
    "true_dynamics_latent_cost",
)
"Who acts in an evaluation: the model's plans, floors, and planners that know the true dynamics."


@dataclass
class JEPAPlanningConfig(JEPARecipeConfig):
    """A world model of two rooms, judged by plans that lead through the door."""

    tells_actions: ClassVar[bool] = True
    "It has one."
    name: str = "jepa_planning"
    "Which recipe: the stem of its file."
    regularizer: Regularizer = Regularizer.vc_idm
    "none, ema, vicreg, vc_idm or sigreg: which of the weighted terms below there are."
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    "How plans are made."
    policies: list[str] = field(default_factory=lambda: list(POLICIES))
    "Who acts in the final evaluation."
    contacts: list[str] = field(default_factory=lambda: ["block", "bounce"])
    "Rules for a dot that runs into something: each episode is played by each."
    episodes: int = 100
    "Episodes of the final evaluation, per rule."
    episode_steps: int = 80
    "Steps of an episode; it counts where the dot is after the last one."
    probe_walks: int = 256
    "Held-out walks; places are read off latents by probes fitted to half of them."
    pairs: int = 200
    "Pairs of a possible and an impossible film, of each kind."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 1, "episodes", "episode_steps")
        at_least(self, "recipe", 8, "probe_walks", "pairs")
        if self.planning.max_norm is None:
            raise ValueError(
                "recipe.planning.max_norm=null: a step of the two rooms is bounded, try 1.8"
            )
        if self.planning.horizon > self.episode_steps:
            raise ValueError(
                f"recipe.planning.horizon={self.planning.horizon} reaches beyond "
                f"recipe.episode_steps={self.episode_steps}: lower it"
            )
        for key, known in (("policies", POLICIES), ("contacts", ("block", "bounce"))):
            if unknown := [name for name in getattr(self, key) if name not in known]:
                raise ValueError(f"recipe.{key}={unknown} are unknown: use {', '.join(known)}")
        if self.policies and not self.contacts:
            raise ValueError(
                "recipe.contacts=[]: no episode is played, name block or bounce, or set "
                "recipe.policies=[]"
            )


@dataclass
class ImageJEPARecipeConfig(JEPARecipeConfig):
    """What recipes of image encoders have in common."""

    probe_views: int = 4
    "Views of each image that a probe is fitted to and judged by; 0 for the image itself."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 0, "probe_views")


@dataclass
class LeJEPARecipeConfig(ImageJEPARecipeConfig):
    """An encoder of images that agrees with itself about their views."""

    name: str = "lejepa"
    "Which recipe: the stem of its file."
    regularizer: Regularizer = Regularizer.sigreg
    "none, ema, vicreg or sigreg: which of the weighted terms below there are."


@dataclass
class IJEPARecipeConfig(ImageJEPARecipeConfig):
    """An encoder of patches that tells the latents of those it does not see."""

    name: str = "ijepa"
    "Which recipe: the stem of its file."
    regularizer: Regularizer = Regularizer.ema
    "none, ema, vicreg or sigreg: which of the weighted terms below there are."
    targets: int = 4
    "Blocks that are to be told."
    target_scale: list[float] = field(default_factory=lambda: [0.15, 0.2])
    "[least, largest] share of the image that a target covers."
    target_aspect: list[float] = field(default_factory=lambda: [0.75, 1.5])
    "[least, largest] height of a target over its width."
    context_scale: list[float] = field(default_factory=lambda: [0.85, 1.0])
    "[least, largest] share of the image that the context's block covers."
    min_keep: int = 4
    "Patches that the context has at least."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 1, "targets", "min_keep")
        span(self, "recipe", 1.0, "target_scale", "context_scale")
        span(self, "recipe", 1e3, "target_aspect")


@dataclass
class JEPAVideoRecipeConfig(JEPARecipeConfig):
    """A predictor of the latents of the next frames."""

    name: str = "jepa_video"
    "Which recipe: the stem of its file."
    films: int = 256
    "Held-out films; a detector is fitted to the latents of half of them."
    horizon: int = 8
    "Frames ahead up to which predictions are judged."
    cells: int = 8
    "The detector says which cells of a grid of so many rows and columns hold a centre."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 8, "films")
        at_least(self, "recipe", 1, "horizon", "cells")


@dataclass
class JEPAVideoMaskedRecipeConfig(JEPARecipeConfig):
    """An encoder of clips that tells the latents of tubes it does not see."""

    name: str = "jepa_video_masked"
    "Which recipe: the stem of its file."
    regularizer: Regularizer = Regularizer.ema
    "none, ema, vicreg or sigreg: which of the weighted terms below there are."
    blocks: list[int] = field(default_factory=lambda: [8, 2])
    "Blocks of each of the masks that a clip is told under, one after the other."
    scales: list[float] = field(default_factory=lambda: [0.15, 0.7])
    "Share of a frame that one block of each mask covers."
    aspect: list[float] = field(default_factory=lambda: [0.75, 1.5])
    "[least, largest] height of a block over its width."
    min_keep: int = 1
    "Patches of a frame that the context has at least."
    films: int = 1024
    "Held-out films; probes are fitted to half of them."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 1, "min_keep")
        at_least(self, "recipe", 16, "films")
        if not self.blocks or len(self.blocks) != len(self.scales) or min(self.blocks) < 1:
            raise ValueError(
                f"recipe.blocks={self.blocks} and recipe.scales={self.scales} must be one number "
                "each for every mask"
            )
        if min(self.scales) <= 0 or max(self.scales) > 1:
            raise ValueError(f"recipe.scales={self.scales} must be above 0 and up to 1")
        span(self, "recipe", 1e3, "aspect")


GOAL_POLICIES = ("model", "random", "zero", "true_dynamics", "oracle")
"Who acts in episodes whose goal a walk reached."


@dataclass
class LeWMRecipeConfig(JEPARecipeConfig):
    """A world model of coloured rooms or Push-T, judged by its plans."""

    name: str = "lewm"
    "Which recipe: the stem of its file."
    regularizer: Regularizer = Regularizer.sigreg
    "none, ema, vicreg or sigreg: which of the weighted terms below there are."
    planning: PlanningConfig = field(
        default_factory=lambda: PlanningConfig(
            horizon=5, replan=5, samples=300, elites=30, iterations=10, std=1.0, max_norm=None,
            holds=[1], fresh=0.0, best=False, cost=PlanCost.last,
        )
    )  # fmt: skip
    "How plans are made, in blocks of data.skip actions."
    policies: list[str] = field(default_factory=lambda: list(GOAL_POLICIES))
    "Who acts in the final evaluation."
    episodes: int = 100
    "Episodes of the final evaluation."
    episode_steps: int = 50
    "Steps of an episode; it counts if the goal was reached at any of them."
    goal_steps: int = 25
    "Steps after which the walk that an episode is taken from was at its goal."
    probe_walks: int = 256
    "Held-out walks; states are read off latents by probes fitted to half of them."
    pairs: int = 400
    "Pairs of a possible and an impossible film, of each kind."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 1, "episodes", "episode_steps", "goal_steps")
        at_least(self, "recipe", 8, "probe_walks", "pairs")
        if unknown := [name for name in self.policies if name not in GOAL_POLICIES]:
            raise ValueError(
                f"recipe.policies={unknown} are unknown: use {', '.join(GOAL_POLICIES)}"
            )


@dataclass
class VJEPA2ACRecipeConfig(LeWMRecipeConfig):
    """A predictor of the coloured rooms on a frozen encoder, judged by its plans."""

    name: str = "vjepa2_ac"
    "Which recipe: the stem of its file."
    regularizer: Regularizer = Regularizer.none
    "none: the encoder is frozen, nothing can collapse."
    weights: str | None = checkpoint()
    "A run of recipe=jepa_video_masked or lewm, whose encoder is taken; null draws one at random."
    rollout_steps: int = 2
    "Steps of the rollout in the loss."
    planning: PlanningConfig = field(
        default_factory=lambda: PlanningConfig(
            horizon=2, replan=1, samples=400, elites=10, iterations=10, std=1.0, max_norm=None,
            holds=[1], fresh=0.0, best=False, cost=PlanCost.last,
        )
    )  # fmt: skip
    "How plans are made, in blocks of data.skip actions."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 1, "rollout_steps")
        if self.regularizer != Regularizer.none or self.target is not None:
            raise ValueError(
                f"recipe.regularizer={self.regularizer}, recipe.target={self.target}: the encoder "
                "of recipe=vjepa2_ac is frozen, set none and null"
            )
