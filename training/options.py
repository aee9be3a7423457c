"""What every group of a configuration may be: `recipe=lejepa`, `data=stdlib`, `model=transformer`.

An option is a dataclass here, and a file of values under configs/. No framework is loaded.
"""

from __future__ import annotations

from functools import cache

from models.agents.config import ActorCriticConfig
from models.language.config import (
    TransformerConfig,
    TTTE2EConfig,
)
from models.worlds.jepa.config import (
    IJEPAConfig,
    JEPAConfig,
    JEPAVideoConfig,
    LeJEPAConfig,
    LeWMConfig,
    VJEPA2ACConfig,
)
from models.worlds.splats.config import (
    DynamicGaussiansConfig,
    GaussianSplattingConfig,
    LvsmConfig,
    MroGwmConfig,
    MvSplatConfig,
)
from models.worlds.video.config import (
    DiamondConfig,
    DiffusionForcingConfig,
    Dreamer4Config,
    GenieConfig,
)
from training.data.config import (
    ConversationsConfig,
    FactsConfig,
    FilesConfig,
    HubConfig,
    MarkovConfig,
    SelfStudyConfig,
    StatementsConfig,
    StdlibConfig,
)
from training.data.config_episodes import (
    AtariConfig,
    CsgoConfig,
    EpisodesConfig,
    ProcgenConfig,
    VptConfig,
)
from training.data.config_scenes import (
    BlenderConfig,
    ColmapConfig,
    DnerfConfig,
    LlffConfig,
    MovingTabletopConfig,
    NerfstudioConfig,
    PushTableConfig,
    PushWorldConfig,
    RandomTablesConfig,
    TabletopConfig,
)
from training.data.config_worlds import (
    HubImagesConfig,
    MovingConfig,
    PinfallConfig,
    PushTConfig,
    RecordedFilmsConfig,
    SmallImagesConfig,
    TrajectoriesConfig,
    TwoRoomsConfig,
    TwoRoomsRGBConfig,
)
from training.recipes.config import (
    CartridgesConfig,
    CartridgesTeacherConfig,
    FastWeightsConfig,
    LanguageModelConfig,
    MemoryBudgetConfig,
    TTTE2ERecipeConfig,
)
from training.recipes.config_scenes import (
    DynamicGaussiansRecipeConfig,
    GaussianSplattingRecipeConfig,
    LvsmRecipeConfig,
    MroGwmRecipeConfig,
    MvSplatRecipeConfig,
)
from training.recipes.config_video import (
    DiamondRecipeConfig,
    DiffusionForcingRecipeConfig,
    DreamAgentConfig,
    Dreamer4RecipeConfig,
    GenieRecipeConfig,
    SelfForcingRecipeConfig,
)
from training.recipes.config_worlds import (
    IJEPARecipeConfig,
    JEPAPlanningConfig,
    JEPAVideoMaskedRecipeConfig,
    JEPAVideoRecipeConfig,
    LeJEPARecipeConfig,
    LeWMRecipeConfig,
    VJEPA2ACRecipeConfig,
)
from training.schema import TrainConfig

# Group -> option of `<option>_schema` -> dataclass. The YAML of an option starts from its schema.
SCHEMAS: dict[str, dict[str, type]] = {
    "recipe": {
        "language_model": LanguageModelConfig,
        "fast_weights": FastWeightsConfig,
        "ttt_e2e": TTTE2ERecipeConfig,
        "cartridges_teacher": CartridgesTeacherConfig,
        "cartridges": CartridgesConfig,
        "memory_budget": MemoryBudgetConfig,
        "jepa_planning": JEPAPlanningConfig,
        "lejepa": LeJEPARecipeConfig,
        "ijepa": IJEPARecipeConfig,
        "jepa_video": JEPAVideoRecipeConfig,
        "jepa_video_masked": JEPAVideoMaskedRecipeConfig,
        "lewm": LeWMRecipeConfig,
        "vjepa2_ac": VJEPA2ACRecipeConfig,
        "diamond": DiamondRecipeConfig,
        "diffusion_forcing": DiffusionForcingRecipeConfig,
        "dreamer4": Dreamer4RecipeConfig,
        "genie": GenieRecipeConfig,
        "self_forcing": SelfForcingRecipeConfig,
        "dream_agent": DreamAgentConfig,
        "gaussian_splatting": GaussianSplattingRecipeConfig,
        "dynamic_gaussians": DynamicGaussiansRecipeConfig,
        "mro_gwm": MroGwmRecipeConfig,
        "lvsm": LvsmRecipeConfig,
        "mvsplat": MvSplatRecipeConfig,
    },
    "model": {
        "transformer": TransformerConfig,
        "ttt_e2e": TTTE2EConfig,
        "jepa": JEPAConfig,
        "lejepa": LeJEPAConfig,
        "ijepa": IJEPAConfig,
        "jepa_video": JEPAVideoConfig,
        "lewm": LeWMConfig,
        "vjepa2_ac": VJEPA2ACConfig,
        "diamond": DiamondConfig,
        "diffusion_forcing": DiffusionForcingConfig,
        "dreamer4": Dreamer4Config,
        "genie": GenieConfig,
        "gaussian_splatting": GaussianSplattingConfig,
        "dynamic_gaussians": DynamicGaussiansConfig,
        "mro_gwm": MroGwmConfig,
        "lvsm": LvsmConfig,
        "mvsplat": MvSplatConfig,
        "actor_critic": ActorCriticConfig,
    },
    "model/ttt_e2e": {"ttt_e2e": TTTE2EConfig},  # model=ttt_e2e/125m
    "data": {
        "stdlib": StdlibConfig,
        "files": FilesConfig,
        "hub": HubConfig,
        "markov": MarkovConfig,
        "facts": FactsConfig,
        "statements": StatementsConfig,
        "self_study": SelfStudyConfig,
        "conversations": ConversationsConfig,
        "two_rooms": TwoRoomsConfig,
        "episodes": EpisodesConfig,
        "atari": AtariConfig,
        "procgen": ProcgenConfig,
        "csgo": CsgoConfig,
        "vpt": VptConfig,
        "small_images": SmallImagesConfig,
        "hub_images": HubImagesConfig,
        "moving": MovingConfig,
        "two_rooms_rgb": TwoRoomsRGBConfig,
        "push_t": PushTConfig,
        "trajectories": TrajectoriesConfig,
        "recorded_films": RecordedFilmsConfig,
        "pinfall": PinfallConfig,
        "tabletop": TabletopConfig,
        "push_table": PushTableConfig,
        "push_world": PushWorldConfig,
        "random_tables": RandomTablesConfig,
        "moving_tabletop": MovingTabletopConfig,
        "dnerf": DnerfConfig,
        "blender": BlenderConfig,
        "colmap": ColmapConfig,
        "llff": LlffConfig,
        "nerfstudio": NerfstudioConfig,
    },
    "data/text": {"stdlib": StdlibConfig, "hub": HubConfig},  # data=text/${scale}
    "data/images": {"small_images": SmallImagesConfig, "hub_images": HubImagesConfig},
    "data/films": {"moving": MovingConfig},
    "data/clips": {"moving": MovingConfig, "trajectories": TrajectoriesConfig},
    "data/acted": {"two_rooms_rgb": TwoRoomsRGBConfig, "trajectories": TrajectoriesConfig},
}


@cache
def register() -> None:
    """Make the schemas known to Hydra, under the names the YAML files' defaults lists use."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=TrainConfig)
    for group, options in SCHEMAS.items():
        for option, node in options.items():
            store.store(group=group, name=f"{option}_schema", node=node)
