"""What a run leaves for others to load: weights as safetensors, the model's sizes beside them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.files import replace_with, write_json
from training.run_directory import plain

if TYPE_CHECKING:
    from torch import Tensor


def write_model(directory: Path, weights: Mapping[str, Tensor], config: Any) -> None:
    """Write model.safetensors and model.json."""
    from safetensors.torch import save_file

    replace_with(directory / "model.safetensors", partial(save_file, dict(weights)))
    write_json(directory / "model.json", plain(config))
