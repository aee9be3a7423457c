"""A reconstructed table without reconstructing it: Gaussians where the tracer hits things."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import yaml

from models.worlds.splats.config import GaussianSplattingConfig
from models.worlds.splats.gaussians import begin
from training.data.config_scenes import PushTableConfig
from training.data.push_table import PushTableData
from training.exchange import write_model

SIZE, EACH = 48, 60


def write_table(folder: Path, seed: int = 0) -> Path:
    """What a run of experiment=mro_gwm/table leaves, sixty Gaussians of each thing."""
    folder.mkdir(parents=True, exist_ok=True)
    config = PushTableConfig(image_size=SIZE, views=12, heldout=1, samples=1)
    data = PushTableData(config, seed=seed).train
    assert data.depths is not None and data.ids is not None
    parts: list[dict[str, torch.Tensor]] = []
    v, u = np.mgrid[:SIZE, :SIZE] + 0.5
    rays = np.stack([u - SIZE / 2, v - SIZE / 2, 0 * u + data.Ks[0, 0, 0]], -1) / data.Ks[0, 0, 0]
    for id in range(5):
        found, seen = [], []
        for image, depth, ids, viewmat in zip(
            data.images, data.depths, data.ids, data.viewmats, strict=True
        ):
            there = ids == id
            inside = rays[there] * depth[there][:, None]
            found.append((inside - viewmat[:3, 3]) @ viewmat[:3, :3])
            seen.append(image[there])
        every, paint = np.concatenate(found), np.concatenate(seen)
        few = np.random.default_rng(id).permutation(len(every))[: EACH * (15 if id == 0 else 1)]
        points, colors = (torch.from_numpy(np.float32(x[few])) for x in (every, paint))
        parts.append(begin(points, colors, 0.9, 0, scale=0.5))
        if id == 0:
            parts[0]["scales"][:, 2] = np.log(0.004)  # flat
    weights = {k: torch.cat([part[k] for part in parts]).contiguous() for k in parts[0]}
    count = len(weights["means"])
    config_of = GaussianSplattingConfig(capacity=count, begin_count=1, degree=0, tile=8)
    write_model(folder, weights, config_of)
    content = {"seed": seed, "data": dataclasses.asdict(config)}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder
