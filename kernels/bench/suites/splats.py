"""Gaussians onto an image: seen once, and with the gradients of all that is learned.

Bytes: every Gaussian's numbers read once and the image written; with gradients, both again. How
many pairs of Gaussians and pixels there are depends on the scene, so that no floating-point
operations are claimed. All of `rasterize` is timed, and all of its gradients: projection,
harmonics, sorting into tiles, compositing. The peer is the same function whose compositing is plain
torch.

Gaussians lie in a ball before the camera, most of them one to three pixels wide, as in scenes that
were reconstructed with so many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.bench.cases import (
    Case,
    Entry,
    Inputs,
    Parts,
    Setting,
    Target,
    Work,
    generator,
    normal,
    picked,
    variants,
    with_tile,
)
from kernels.splats.op import rasterize

SOURCES = ("splats/*.py", "tuned/splat_*.json", "launch.py", "tiles.py")
DEGREE = 3
COEFFICIENTS = (DEGREE + 1) ** 2
NUMBERS = 3 + 4 + 3 + 1 + 3 * COEFFICIENTS
"Of a Gaussian."
DISTANCE, FOCAL = 3.0, 1.1
"Of the camera from the middle of the ball, whose radius is 1; of its width."
WIDE = 1.5
"Pixels of the middle Gaussian's standard deviation."
LEARNED = "means", "quats", "scales", "opacities", "sh"


@dataclass(frozen=True)
class Problem:
    """n Gaussians, seen by c cameras of size x size pixels."""

    name: str
    n: int
    c: int
    size: int
    gradients: bool
    targets: tuple[Target, ...] = ()
    extra: bool = False


def problems(at: Setting) -> Iterator[Problem]:
    n, size = at.length(1_000_000, 150), at.size(1024, 24)
    forward = Target("forward 200 a second", 1.0, ms=1000 / 200)
    both = Target("forward and backward 60 a second", 1.0, ms=1000 / 60, stretch=1000 / 60 / 3)
    yield Problem("a million on a megapixel", n, 1, size, False, (forward,))
    yield Problem("a million on a megapixel, gradients", n, 1, size, True, (both,))
    few, small = at.size(3000, 50), at.size(64, 16)
    yield Problem("plans of an agent", few, at.size(64, 2), small, False, extra=True)


def cases(at: Setting) -> Iterator[Case]:
    for problem in problems(at):
        passes = 2 if problem.gradients else 1
        read, written = problem.n * NUMBERS, problem.c * problem.size**2 * 3
        yield Case(
            "splats",
            problem.name,
            {"n": problem.n, "cameras": problem.c, "width": problem.size, "degree": DEGREE},
            torch.float32,
            Work(0.0, 4.0 * passes * (read + written)),
            partial(draw, problem),
            partial(oracle, problem),
            parts,
            1e-3,
            tuple(entries(problem, at)),
            problem.targets,
            SOURCES,
            extra=problem.extra,
        )


def draw(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """What `rasterize` takes, and the gradient of the image."""
    rng, n = generator(device, seed), problem.n
    some = partial(normal, rng, dtype=torch.float32)
    places = some(n, 3)
    radii = torch.rand(n, 1, generator=rng, device=device) ** (1 / 3)
    pixel = DISTANCE / (FOCAL * problem.size)
    viewmats = torch.eye(4, device=device).repeat(problem.c, 1, 1)
    turn, _ = torch.linalg.qr(some(problem.c, 3, 3))
    viewmats[:, :3, :3] = turn * torch.linalg.det(turn).sign()[:, None, None]
    viewmats[:, 2, 3] = DISTANCE
    focal, middle = FOCAL * problem.size, problem.size / 2
    K = torch.tensor([[focal, 0.0, middle], [0.0, focal, middle], [0.0, 0.0, 1.0]], device=device)
    return {
        "means": radii * places / places.norm(dim=-1, keepdim=True),
        "quats": some(n, 4),
        "scales": pixel * WIDE * (0.5 * some(n, 3)).exp(),
        "opacities": some(n).sigmoid(),
        "sh": 0.3 * some(n, COEFFICIENTS, 3),
        "viewmats": viewmats,
        "Ks": K.repeat(problem.c, 1, 1),
        "dcolor": some(problem.c, problem.size, problem.size, 3),
        "size": problem.size,
    }


def entries(problem: Problem, at: Setting) -> Iterator[Entry]:
    kernel = "splat_backward" if problem.gradients else "splat_forward"
    ours = partial(step, problem.gradients, at.impl)
    keys: dict[str, int] = {"sizes": 0} if problem.gradients else {"features": 4}
    yield Entry(
        "triton", ours, ours=True, kernels=(kernel,), on_cpu=True, capturable=False,
        note=picked(kernel, at.arch, **keys),
    )  # fmt: skip
    for label, tile in variants(kernel, at.arch, **keys):
        yield Entry(
            f"triton {label}", with_tile(kernel, tile, ours), ours=True, variant=True,
            kernels=(kernel,), capturable=False,
        )  # fmt: skip
    plain = partial(step, problem.gradients, "torch")
    yield Entry("torch eager", plain, on_cpu=True, capturable=False)


def step(gradients: bool, impl: str, inputs: Inputs) -> Any:
    """The image, and the gradients of all that is learned if they are asked for."""
    size = inputs["size"]
    leaves = {name: inputs[name].detach().requires_grad_(gradients) for name in LEARNED}

    def run() -> tuple[Tensor, ...]:
        cameras = {name: inputs[name] for name in ("viewmats", "Ks")}
        with torch.set_grad_enabled(gradients):
            color = rasterize(**leaves, **cameras, width=size, height=size, impl=impl).color
        if not gradients:
            return (color,)
        found = torch.autograd.grad(color, list(leaves.values()), inputs["dcolor"])
        return color.detach(), *found

    return run


def oracle(problem: Problem, inputs: Inputs) -> Parts:
    """The same in float64 and plain torch, which tests compare with the definition."""
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return parts(step(problem.gradients, "torch", exact)())


def parts(result: tuple[Tensor, ...]) -> Parts:
    """The image and the gradients."""
    names = ("color", *(f"d {name}" for name in LEARNED))
    return dict(zip(names, result, strict=False))
