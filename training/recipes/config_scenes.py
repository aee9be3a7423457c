"""Configuration of recipes that reconstruct scenes. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from training.fields import above, at_least, checkpoint, within
from training.recipes.config import RecipeConfig


class Density(StrEnum):
    """How the number of Gaussians changes."""

    none = "none"  # it does not
    default = "default"  # clones, halves, removals (the paper's)
    absolute = "absolute"  # the same by sums of sizes over pixels (AbsGS)
    mcmc = "mcmc"  # the dead move, all stir


@dataclass
class GaussianSplattingRecipeConfig(RecipeConfig):
    """Gaussians that are fitted to images of a scene. `optim.lr` is that of means, for a scene of
    extent 1."""

    name: str = "gaussian_splatting"
    "Which recipe: the stem of its file."
    ssim_weight: float = 0.2
    "Share of 1 - SSIM in the loss; the rest is the absolute error."
    scales_lr: float = 5e-3
    "Learning rate of the logarithms of scales."
    opacities_lr: float = 5e-2
    "Of the logits of opacities."
    quats_lr: float = 1e-3
    "Of rotations."
    colors_lr: float = 2.5e-3
    "Of the colour from everywhere."
    directions_lr: float = 1.25e-4
    "Of what of a colour depends on the direction."
    degree_every: float = 0.0333
    "Share of the run after which one more degree of harmonics is looked at."
    density: Density = Density.default
    "none, default, absolute or mcmc."
    refine_from: float = 0.0167
    "Share of the run after which Gaussians are added and removed."
    refine_until: float = 0.5
    "Share of the run after which they are no more (MCMC: 0.83)."
    refine_every: int = 100
    "Steps between."
    pull_least: float = 2e-4
    "Mean gradient of a centre, in half widths of the image, that asks for more (AbsGS: 8e-4)."
    small: float = 0.01
    "Width up to which a Gaussian is cloned and not halved, relative to the scene's extent."
    largest: float = 0.1
    "Width beyond which it is removed."
    largest_from: float = 0.1
    "Share of the run after which it is."
    opacity_least: float = 0.005
    "Opacity below which a Gaussian is removed, or dead."
    revised: bool = False
    "Halves share their light (Revising Densification)."
    reset_every: int = 0
    "Steps between resets of opacities to 0.01 at most, while refined (3D-GS: 3000); 0: none."
    growth: float = 1.05
    "MCMC: how many times as many Gaussians there are after each refinement, up to the capacity."
    noise: float = 5e5
    "MCMC: how far means stir in a step, times their learning rate."
    opacity_weight: float = 0.0
    "Of the mean opacity in the loss (MCMC: 0.01)."
    scale_weight: float = 0.0
    "Of the mean scale in the loss (MCMC: 0.01)."
    poses_lr: float = 0.0
    "Learning rate of a correction of each camera; 0: cameras are as they are said to be."
    exposures_lr: float = 0.0
    "Learning rate of the light of each image; 0: it is the same in all."
    agreement: bool = False
    "Render held-out views through every backend that runs here at the end, and compare."

    def __post_init__(self) -> None:
        within(self, "recipe", 0.0, 1.0, "ssim_weight", "degree_every", "refine_from",
               "refine_until", "largest_from", "opacity_least")  # fmt: skip
        above(self, "recipe", 0.0, "scales_lr", "opacities_lr", "quats_lr", "colors_lr",
              "directions_lr", "small", "largest")  # fmt: skip
        at_least(self, "recipe", 0, "pull_least", "reset_every", "noise", "opacity_weight",
                 "scale_weight", "poses_lr", "exposures_lr")  # fmt: skip
        at_least(self, "recipe", 1, "refine_every", "growth")


@dataclass
class DynamicGaussiansRecipeConfig(GaussianSplattingRecipeConfig):
    """Gaussians that are fitted to images of a scene that moves, each of which has a time."""

    name: str = "dynamic_gaussians"
    "Which recipe: the stem of its file."
    warm: float = 0.1
    "Share of the run in which nothing moves yet, unless Gaussians are tracked."
    motion_lr: float = 8e-4
    "Learning rate of the network that says where Gaussians are; it falls."
    planes_lr: float = 1.6e-3
    "Of planes; it falls."
    velocities_lr: float = 1.6e-4
    "Of the coefficients of polynomials, for a scene of extent 1; it falls."
    spins_lr: float = 1e-3
    "Of how fast Gaussians turn."
    middles_lr: float = 1e-3
    "Of the time about which a Gaussian is there."
    lastings_lr: float = 1e-2
    "Of the logarithm of how long."
    tracking_lr: float = 1.6e-4
    "Of means after the first time, for a scene of extent 1, if Gaussians are tracked."
    turning_lr: float = 1e-3
    "Of rotations then."
    neighbours: int = 20
    "Of each Gaussian, that it keeps together with."
    neighbour_decay: float = 2000.0
    "What a neighbour at distance d counts is exp(-this d^2), in units of the scene."
    rigid_weight: float = 4.0
    "In the loss: neighbours move as one body."
    rot_weight: float = 4.0
    "They turn alike."
    iso_weight: float = 2.0
    "They stay as far from each other."

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "recipe", 0.0, 1.0, "warm")
        above(self, "recipe", 0.0, "motion_lr", "planes_lr", "velocities_lr", "spins_lr",
              "middles_lr", "lastings_lr", "tracking_lr", "turning_lr")  # fmt: skip
        at_least(self, "recipe", 0, "neighbour_decay", "rigid_weight", "rot_weight",
                 "iso_weight")  # fmt: skip
        at_least(self, "recipe", 1, "neighbours")


@dataclass
class MroGwmRecipeConfig(RecipeConfig):
    """Objects that are pushed: how they move is learned from poses, and seen by Gaussians."""

    name: str = "mro_gwm"
    "Which recipe: the stem of its file."
    scene: str | None = checkpoint()
    "Directory of a finished run of experiment=mro_gwm/table: the objects, as Gaussians."
    unroll: int = 3
    "Steps that are predicted one after the other in training."
    ahead: int = 10
    "Steps after which predictions are judged."
    moved: float = 0.05
    "Metres that an object must go within them to be judged."
    tracked: int = 4
    "Episodes in which poses are found from images, at the end."
    cameras: int = 4
    "That see them."
    image_size: int = 64
    "Height and width of their images, in pixels."
    tracking_steps: int = 20
    "Of Adam, for the poses of each image."
    tracking_lr: float = 0.01
    "Metres and radians of a step."
    episodes: int = 20
    "In which the T is pushed to a goal by plans, at the end; 0: none."
    episode_steps: int = 30
    "Actions of each, at most."
    samples: int = 64
    "Sequences of actions that are tried in each iteration of planning."
    iterations: int = 3
    "Of planning."
    horizon: int = 10
    "Actions of a plan."
    consulted: int = 1
    "Members of the ensemble that plans are tried in."

    def __post_init__(self) -> None:
        at_least(self, "recipe", 1, "unroll", "ahead", "cameras", "tracking_steps",
                 "episode_steps", "iterations", "horizon", "consulted")  # fmt: skip
        at_least(self, "recipe", 0, "moved", "tracked", "episodes")
        at_least(self, "recipe", 12, "image_size", "samples")
        above(self, "recipe", 0.0, "tracking_lr")


@dataclass
class LvsmRecipeConfig(RecipeConfig):
    """A view from two others, without any 3D."""

    name: str = "lvsm"
    "Which recipe: the stem of its file."


@dataclass
class MvSplatRecipeConfig(RecipeConfig):
    """Gaussians from two views, in one pass."""

    name: str = "mvsplat"
    "Which recipe: the stem of its file."
