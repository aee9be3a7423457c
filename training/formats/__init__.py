"""Files of Gaussians that other programs read and write: .ply, .splat, .spz, .glb.

    write("scene.ply", gaussians)
    gaussians = read("scene.spz")

What a file loses is said in its module. Axes are those of the scene; those that a format prescribes
are turned to on the way out, and back on the way in, so that a scene that went through a file looks
the same from the same camera. Nothing of a file is ever evaluated; what is cut short, too large or
of another kind is refused before memory is taken for it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.files import write_atomic
from training.formats.gaussians import Splats

FORMATS = {".ply": "ply", ".splat": "splat", ".spz": "spz", ".glb": "gltf"}
"Ending of a file -> its module here."


def module_of(path: str | Path) -> Any:
    """By the file's ending. Raises UserError."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise UserError(f"{path}: give a file that ends in {', '.join(FORMATS)}")
    return importlib.import_module(f"training.formats.{FORMATS[ending]}")


def read(path: str | Path) -> Splats:
    """Raises UserError for what cannot be read, or is not what its ending says."""
    form = module_of(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return form.parse(content).checked()
    except ValueError as error:
        raise UserError(f"{path} is no whole {Path(path).suffix} file: {error}") from None


def write(path: str | Path, splats: Splats) -> None:
    """All of it or nothing. Raises UserError for another ending or what is not finite."""
    form = module_of(path)
    try:
        content = form.serialise(splats.checked())
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    write_atomic(Path(path), content)
