"""Configuration of the recipes whose models draw a world. Loads no framework."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.data.config_worlds import Split
from training.fields import above, at_least, checkpoint, within
from training.recipes.config import RecipeConfig


@dataclass
class VideoWorldConfig(RecipeConfig):
    """What recipes of models that draw a world have in common: how they are judged."""

    blind: bool = False
    "Train and judge without actions: the control that cannot be steered."
    dreams: int = 64
    "Held-out clips that are dreamed on from."
    horizon: int = 30
    "Frames of a dream."
    endure: int = 0
    "Frames of one dream at the end whose first and last are compared in time and memory; 0: none."
    splits: list[Split] = field(default_factory=list)
    "Other balls that dreams are judged on at the end: speed, size, pairs."

    def __post_init__(self) -> None:
        at_least(self, "recipe", 2, "dreams")
        at_least(self, "recipe", 5, "horizon")
        at_least(self, "recipe", 0, "endure")


@dataclass
class DiamondRecipeConfig(VideoWorldConfig):
    """The next frame, drawn by diffusion beside the frames before it."""

    name: str = "diamond"
    "Which recipe: the stem of its file."
    context_noise: float = 0.0
    "Largest standard deviation of noise on the frames that are seen, in training."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 0, "context_noise")


@dataclass
class DiffusionForcingRecipeConfig(VideoWorldConfig):
    """Films whose frames are each as noisy as they like."""

    name: str = "diffusion_forcing"
    "Which recipe: the stem of its file."
    snr_clip: float = 5.0
    "Signal over noise from which on a level counts no less."
    clean: float = 0.0
    "Share of the frames that are as noisy as those of the past in dreams (Diffusion Forcing: 0)."
    fade: float | None = 0.96
    "How much of the signal of the frames before counts for a frame; null: none of it."

    def __post_init__(self) -> None:
        super().__post_init__()
        above(self, "recipe", 0, "snr_clip")
        within(self, "recipe", 0.0, 0.99, "clean")
        if self.fade is not None:
            within(self, "recipe", 0.0, 1.0, "fade")


@dataclass
class SelfForcingRecipeConfig(VideoWorldConfig):
    """A student of few steps, taught on films that it draws itself."""

    name: str = "self_forcing"
    "Which recipe: the stem of its file."
    teacher: str | None = checkpoint()
    "Directory of a finished run of diffusion_forcing."
    critic_steps: int = 5
    "Steps of the critic for each of the student."
    teacher_steps: int = 8
    "Steps in which the teacher draws a frame, when it is judged beside."

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "recipe", 1, "critic_steps", "teacher_steps")


@dataclass
class Dreamer4RecipeConfig(VideoWorldConfig):
    """Clean frames told from any noise, in steps of any size."""

    name: str = "dreamer4"
    "Which recipe: the stem of its file."
    prepare: float = 0.3
    "Share of the run in which a tokenizer learns, if the model has one."
    jumps: float = 0.25
    "Share of the clips that learn larger steps from two smaller ones."
    jumps_after: float = 0.3
    "Share of the run before that: what is taught must have been learned."

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "recipe", 0.0, 1.0, "prepare", "jumps", "jumps_after")


@dataclass
class GenieRecipeConfig(VideoWorldConfig):
    """Tokens and latent actions first, then what follows from them."""

    name: str = "genie"
    "Which recipe: the stem of its file."
    prepare: float = 0.3
    "Share of the run in which the tokenizer and the latent actions learn; then the dynamics does."
    spread: float = 0.01
    "Weight of the term that keeps latent actions from being all the same."
    jitter: float = 0.5
    "Deviation of the noise on their numbers before they are rounded, while they learn."
    settle: float = 1.0
    "Share of the preparation in which they do: later they would tell one action from itself."
    clean: float = 0.5
    "Share of the frames no token of which is masked (published: 0)."
    masked: float = 0.5
    "Least share of the others' tokens that are; the most is all."
    blur: float = 0.0
    "Most of a frame's numbers that the dynamics is shown a level off: its own frames drift, too."
    labelled: int = 64
    "Clips with actions by which the latent ones are told apart."

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "recipe", 0.0, 1.0, "prepare", "settle", "clean", "masked", "blur")
        at_least(self, "recipe", 0, "spread", "jitter")
        at_least(self, "recipe", 1, "labelled")
        if self.prepare in (0.0, 1.0) or self.clean == 1 or not self.settle:
            raise ValueError(
                f"recipe.prepare={self.prepare} must be between 0 and 1, "
                f"recipe.settle={self.settle} above 0 and recipe.clean={self.clean} below 1: "
                "every part has something to learn"
            )


@dataclass
class DreamAgentConfig(RecipeConfig):
    """An agent that learns to act in the dreams of a world model."""

    name: str = "dream_agent"
    "Which recipe: the stem of its file."
    world: str | None = checkpoint()
    "Directory of the run that the world is from; null: the simulator, which is the ceiling."
    draw_steps: int | None = None
    "Steps in which a world model draws a frame; null: as it does when it is played."
    horizon: int = 15
    "Frames of a dream."
    discount: float = 0.985
    "How much less a reward counts that comes a frame later."
    lam: float = 0.95
    "How much longer returns count than shorter ones."
    entropy: float = 0.001
    "Weight of the entropy of what is done."
    normalise: bool = False
    "Divide how much better actions were than expected by its root mean square."
    passes: int = 1
    "How often each dream is learned from (DIAMOND: once)."
    clip: float = 0.2
    "By how much later passes may make what was done more or less likely, of what it was."
    episodes: int = 128
    "Lives outside in which it is judged."
    frames: int = 100
    "Longest of these."
    ranked: int = 32
    "Lives inside and outside by which policies are ranked at the end; 0: none."
    ranked_frames: int = 40
    "Longest of these."

    def __post_init__(self) -> None:
        within(self, "recipe", 0.0, 1.0, "discount", "lam")
        at_least(self, "recipe", 0, "entropy", "ranked")
        above(self, "recipe", 0, "clip")
        at_least(
            self,
            "recipe",
            1,
            "passes",
            "horizon",
            "episodes",
            "frames",
            "draw_steps",
            "ranked_frames",
        )
