"""One scene through every backend of `rasterize`: how far their images are from torch's in float64.

    python -m training.evaluation.scene_agreement scene.npz seen.npz     in the interpreter

Triton is interpreted in a process of its own, as it must be told so before it is imported; on a GPU
it runs here. jax runs on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.splats.op import rasterize
from models.worlds.splats.gaussian_splatting import GaussianSplatting
from models.worlds.splats.gaussians import activated
from training.data.posed import PosedData
from training.errors import UserError

VIEWS = 2
TIMEOUT_S = 900


def agreement(
    model: GaussianSplatting, data: PosedData[Any], device: torch.device
) -> dict[str, float]:
    """Largest difference of a colour from 0 to 1, in two held-out views, of each backend."""
    posed, tile = data.heldout, model.config.tile
    _, height, width, _ = posed.images.shape
    given = {k: x.detach().cpu() for k, x in activated(model.gaussians.fields()).items()}
    given["viewmats"], given["Ks"] = (
        torch.from_numpy(x[:VIEWS]) for x in (posed.viewmats, posed.Ks)
    )
    given["background"] = torch.tensor(data.background)
    sizes: dict[str, Any] = {"width": width, "height": height, "tile": tile}
    exact = rasterize(**{k: x.double() for k, x in given.items()}, **sizes, impl="torch").color
    images = {
        "torch": rasterize(**given, **sizes, impl="torch").color.numpy(),
        "jax": by_jax({k: x.numpy() for k, x in given.items()}, sizes),
    }
    if device.type == "cuda":
        on_gpu = {k: x.to(device) for k, x in given.items()}
        images["triton"] = rasterize(**on_gpu, **sizes, impl="triton").color.cpu().numpy()
    else:
        images["triton"] = interpreted({k: x.numpy() for k, x in given.items()}, sizes)
    off = {name: np.abs(image - exact.numpy()) for name, image in images.items()}
    return {f"agreement/{name}": float(x.max()) for name, x in off.items()} | {
        "agreement/worst": float(max(x.max() for x in off.values()))
    }


def by_jax(given: dict[str, np.ndarray], sizes: dict[str, Any]) -> np.ndarray:
    """What the twin shows, given as much room as it asks for."""
    from kernels.splats.op_jax import enough
    from kernels.splats.op_jax import rasterize as twin

    room = 1024, 128
    while True:
        seen = twin(**given, **sizes, pairs=room[0], longest=room[1])
        if enough(seen, *room) == room:
            return np.asarray(seen.color)
        room = enough(seen, *room)


def interpreted(given: dict[str, np.ndarray], sizes: dict[str, Any]) -> np.ndarray:
    """What Triton's interpreter shows. Raises UserError if it does not come to an end."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "scene.npz", Path(folder) / "seen.npz"
        np.savez(asked, **given, **sizes)  # type: ignore[arg-type]
        command = [sys.executable, "-m", "training.evaluation.scene_agreement", asked, answer]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise UserError(
                "recipe.agreement: Triton's interpreter failed, set it to false: "
                + done.stderr.strip()[-500:]
            )
        with np.load(answer, allow_pickle=False) as found:
            return found["color"]


def main(asked: str, answer: str) -> None:
    with np.load(asked, allow_pickle=False) as content:
        given = dict(content)
    sizes: dict[str, Any] = {name: int(given.pop(name)) for name in ("width", "height", "tile")}
    tensors = {name: torch.from_numpy(x) for name, x in given.items()}
    np.savez(answer, color=rasterize(**tensors, **sizes, impl="interpret").color.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
