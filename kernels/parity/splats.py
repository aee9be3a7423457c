"""Random cases of rasterising: cameras inside and outside, needles, thresholds, gradients of all.

A pixel and a Gaussian may lie so near a threshold (1/255 of the pixel, or its being full) that
rounding decides on which side: such a scene is drawn again, so that what is compared is arithmetic.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.parity.case import SEEDS, Case, Comparison, compare, guarded, poisoned
from kernels.splats import op, reference
from kernels.splats.constants import ALPHA_LEAST, NEAR, STOP

COUNTS = {"small": (1, 2, 17, 40), "large": (17, 300, 1000)}
SIZES = {"small": ((8, 8), (21, 13), (16, 30)), "large": ((64, 64), (93, 50), (128, 32))}
MARGIN = 1e-4
"Relative distance from a threshold that no pixel of a case falls below."
CAPS = 1e-4, 1e-3
"""Of the relative norm, for values and gradients, besides four times that of plain torch: cameras
within Gaussians make much of what projection, which both share, rounds to float32."""


def cases(size: str, count: int, dtype: torch.dtype) -> Iterator[Case]:
    """`count` cases in float32, none in narrower ones; "small" suits the interpreter."""
    if dtype != torch.float32:
        return
    for index in range(count):
        inputs, options = draw(size, SEEDS + index)
        n, c = len(inputs["means"]), len(inputs["viewmats"])
        name = f"{n} Gaussians, {c} cameras of {options['width']} x {options['height']}"
        yield Case("rasterize", name, dtype, runner(inputs, options))


def draw(size: str, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in float64 by the names of `rasterize`, and its options."""
    for attempt in range(100):
        found = _draw(size, 1000 * seed + attempt)
        if _clear(*found):
            return found
    raise RuntimeError("no scene keeps clear of its thresholds")


def _draw(size: str, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, c, f = rng.choice(COUNTS[size]), rng.choice([1, 1, 2, 3]), rng.choice([1, 3, 3, 5])
    width, height = rng.choice(SIZES[size])
    spread, far = rng.choice([0.3, 0.6, 1.5]), rng.choice([0.5, 2.5, 4.0])
    viewmats = torch.eye(4, dtype=torch.float64).repeat(c, 1, 1)
    turn, _ = torch.linalg.qr(normal(c, 3, 3))
    viewmats[:, :3, :3] = turn * torch.linalg.det(turn).sign()[:, None, None]
    viewmats[:, :3, 3] = torch.tensor([0.0, 0.0, far]) + 0.1 * normal(c, 3)
    focal = rng.choice([0.7, 1.1, 2.0]) * width
    K = [[focal, 0, width * 0.45], [0, focal * 1.1, height * 0.6], [0, 0, 1]]
    inputs = {
        "means": spread * normal(n, 3),
        "quats": normal(n, 4),
        "scales": (
            rng.choice([0.3, 1.0, 2.0]) * normal(n, 3) + rng.choice([-4.0, -2.5, -1.5])
        ).exp(),
        "opacities": (2 * normal(n) + rng.choice([-2.0, 0.0, 3.0])).sigmoid(),
        "viewmats": viewmats,
        "Ks": torch.tensor(K, dtype=torch.float64).repeat(c, 1, 1),
    }
    if rng.random() < 0.5:
        inputs["sh"] = 0.3 * normal(n, rng.choice([1, 4, 9, 16]), 3)
        f = 3
    else:
        inputs["colors"] = normal(n, f) if rng.random() < 0.7 else normal(c, n, f)
    if rng.random() < 0.7:
        inputs["background"] = normal(f)
    options = {"width": width, "height": height, "antialiased": rng.random() < 0.4}
    return inputs, options


def _clear(inputs: dict[str, Tensor], options: dict[str, Any]) -> bool:
    """Whether no pixel is near a threshold, and no two Gaussians equally far."""
    trace: list[Tensor] = []
    reference.rasterize(**inputs, **options, trace=trace)
    R, t = inputs["viewmats"][:, 2, :3], inputs["viewmats"][:, 2, 3]
    depths = (inputs["means"] @ R.T + t).T.sort(dim=-1).values
    apart = bool((depths.diff(dim=-1) > 1e-5).all()) and bool(((depths - NEAR).abs() > 1e-5).all())
    if not trace or not apart:
        return apart
    alphas, lights = torch.stack(trace, dim=1)
    off = ((alphas / ALPHA_LEAST - 1).abs() > MARGIN) & ((lights / STOP - 1).abs() > 10 * MARGIN)
    return bool(off.all())


def with_gradients(
    function: Any, inputs: dict[str, Tensor], options: dict[str, Any], **more: Any
) -> dict[str, Tensor]:
    """Images, and the gradients of a random function of them."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with poisoned():
        seen = function(**leaves, **options, **more)
        images = seen if isinstance(seen, tuple) else (seen.color, seen.alpha, seen.depth)
        generator = torch.Generator().manual_seed(1)
        weights = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in images
        ]
        loss = sum(
            ((x * w).sum() for x, w in zip(images, weights, strict=True)),
            torch.zeros(()).to(images[0]),
        )
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = dict(zip(("color", "alpha", "depth"), images, strict=True))
    for name, gradient in zip(leaves, gradients, strict=True):
        found[f"d {name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return found


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over that of what is exact."""
    norm = exact.norm().item()
    return (found.detach().double().cpu() - exact).norm().item() / norm if norm else 0.0


def runner(inputs: dict[str, Tensor], options: dict[str, Any]):
    def run(impl: str, device: torch.device) -> list[Comparison]:
        exact = with_gradients(reference.rasterize, inputs, options)
        narrow = {name: guarded(x.float().to(device)) for name, x in inputs.items()}
        eager = with_gradients(op.rasterize, narrow, options, impl="torch")
        got = with_gradients(op.rasterize, narrow, options, impl=impl)
        return [
            compare(
                what,
                got[what],
                eager[what],
                exact[what],
                torch.float32,
                cap=CAPS[what[:2] == "d "] + 4 * relative(eager[what], exact[what]),
            )
            for what in exact
        ]

    return run
