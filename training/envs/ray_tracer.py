"""Solids, lit by one lamp and seen by cameras: images with exact depth, normals and ids.

    scene = Scene(solids, lamp=Lamp())          Solid("sphere", position=(0, 0, 0.3), size=(0.3,))
    views = render(scene, viewmats, Ks, 64, 64)  color, depth, normal, id

The world every 3D model here learns from: analytic, so that it is the same on every machine and its
truth is exact. A pixel's colour is the mean over `samples` x `samples` rays, with hard shadows and
Blinn's highlights; depth, normal and id are those of the ray through its middle. Cameras are those
of `kernels.splats.op`: x to the right, y down, z forward.

    kind        size                            in its own frame, which `rotation` turns
    sphere      radius
    box         half lengths (3)
    capsule     radius, half length             along z, of the part between its two half spheres
    cylinder    radius, half length             along z, with flat ends
    disc        radius                          in z = 0

Dimensions: c cameras, r rays, m solids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.splats.project import rotations

NOTHING = -1
"Id of what no solid covers."

KINDS = {"sphere": 1, "box": 3, "capsule": 2, "cylinder": 2, "disc": 1}
"Numbers of a size."

PATTERNS = ("plain", "checker", "stripes")
AWAY = 1e-4
"How far from a surface its shadow ray starts."


@dataclass(frozen=True)
class Solid:
    """One body and its paint."""

    kind: str
    size: tuple[float, ...]
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    "Quaternion wxyz, of any length but 0."
    color: tuple[float, float, float] = (0.7, 0.7, 0.7)
    other: tuple[float, float, float] = (0.2, 0.2, 0.2)
    "Second colour of a pattern."
    pattern: str = "plain"
    "plain, checker (cubes in the body's own frame) or stripes (across its z)."
    width: float = 0.2
    "Of a cube or a stripe."
    shine: float = 0.0
    "Strength of its highlight."
    id: int = 0
    "What it is part of: several solids may be one object."

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown: use {', '.join(KINDS)}")
        if len(self.size) != KINDS[self.kind] or min(self.size) <= 0:
            raise ValueError(
                f"size={self.size} of a {self.kind} must be {KINDS[self.kind]} number(s) above 0"
            )
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r} is unknown: use {', '.join(PATTERNS)}")
        if not any(self.rotation):
            raise ValueError("rotation is a quaternion of length 0")


@dataclass(frozen=True)
class Lamp:
    """Parallel light, and what comes from everywhere."""

    towards: tuple[float, float, float] = (0.4, -0.5, 1.0)
    "Where it comes from, of any length but 0."
    ambient: float = 0.35
    "Share of a surface's colour that shows in the shadow."


@dataclass(frozen=True)
class Scene:
    """What there is to be seen."""

    solids: Sequence[Solid]
    lamp: Lamp = field(default_factory=Lamp)
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def without(self, id: int) -> Scene:
        """The same without what has that id."""
        return replace(self, solids=[solid for solid in self.solids if solid.id != id])


@dataclass(frozen=True)
class Views:
    """Images of cameras, and the truth about them."""

    color: Float[Tensor, "c h w 3"]
    depth: Float[Tensor, "c h w"]
    "Along z of the camera; infinite where nothing is."
    normal: Float[Tensor, "c h w 3"]
    "In the world, outwards; 0 where nothing is."
    id: Int[Tensor, "c h w"]
    "Of the solid; NOTHING where nothing is."


def look_at(
    eye: Float[Tensor, "c 3"], target: Float[Tensor, "c 3"], up: tuple[float, ...] = (0.0, 0.0, 1.0)
) -> Float[Tensor, "c 4 4"]:
    """World to camera, for cameras that look from `eye` to `target`, `up` being up in their images.

    Raises:
        ValueError: one that looks along `up`, or from its target.
    """
    forward = torch.nn.functional.normalize(target - eye, dim=-1)
    right = torch.linalg.cross(forward, torch.tensor(up, dtype=eye.dtype).expand_as(eye))
    if (right.norm(dim=-1) < 1e-6).any():
        raise ValueError("a camera looks along `up`, or from its target: move it")
    right = torch.nn.functional.normalize(right, dim=-1)
    R = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-2)
    viewmat = torch.eye(4, dtype=eye.dtype, device=eye.device).repeat(len(eye), 1, 1)
    viewmat[:, :3, :3] = R
    viewmat[:, :3, 3] = -torch.einsum("cij,cj->ci", R, eye)
    return viewmat


def intrinsics(focal: float, width: int, height: int) -> Float[Tensor, "3 3"]:
    """Of a camera whose principal point is the image's middle."""
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def render(
    scene: Scene, viewmats: Float[Tensor, "c 4 4"], Ks: Float[Tensor, "c 3 3"], width: int,
    height: int, samples: int = 3,
) -> Views:  # fmt: skip
    """What the cameras see, one after the other."""
    bodies = _Bodies(scene, viewmats.dtype, viewmats.device)
    images = [
        _view(scene, bodies, viewmat, K, width, height, samples)
        for viewmat, K in zip(viewmats, Ks, strict=True)
    ]
    return Views(*(torch.stack(parts) for parts in zip(*images, strict=True)))


def _view(
    scene: Scene, bodies: _Bodies, viewmat: Tensor, K: Tensor, width: int, height: int, samples: int
):
    R, t = viewmat[:3, :3], viewmat[:3, 3]
    eye = -R.T @ t
    offsets = (torch.arange(samples, dtype=K.dtype, device=K.device) + 0.5) / samples
    towards = _rays(K, width, height, offsets) @ R
    shape = (height, width, samples * samples, 3)
    color = _shade(scene, bodies, eye, towards.reshape(-1, 3)).view(shape).mean(2)
    middle = _rays(K, width, height, offsets.new_tensor([0.5]))[:, :, 0] @ R
    unit = torch.nn.functional.normalize(middle, dim=-1).reshape(-1, 3)
    distance, normal, index, _ = bodies.hit(eye.expand_as(unit), unit)
    depth = distance * (unit @ R[2])
    ids = torch.where(index >= 0, bodies.ids[index.clamp_min(0)], NOTHING)
    return color, depth.view(height, width), normal.view(height, width, 3), ids.view(height, width)


def _rays(K: Tensor, width: int, height: int, offsets: Tensor) -> Float[Tensor, "h w s 3"]:
    """Directions through pixels, of depth 1, in the camera."""
    x = torch.arange(width, dtype=K.dtype, device=K.device)[:, None] + offsets
    y = torch.arange(height, dtype=K.dtype, device=K.device)[:, None] + offsets
    x, y = (x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1]
    k = len(offsets)
    shape = height, width, k, k
    x, y = x[None, :, None, :].expand(shape), y[:, None, :, None].expand(shape)
    return torch.stack([x, y, torch.ones_like(x)], dim=-1).reshape(height, width, k * k, 3)


def _shade(scene: Scene, bodies: _Bodies, eye: Tensor, towards: Tensor) -> Float[Tensor, "r 3"]:
    """What comes back along rays from the eye."""
    towards = torch.nn.functional.normalize(towards, dim=-1)
    distance, normal, index, local = bodies.hit(eye.expand_as(towards), towards)
    found = index >= 0
    color = towards.new_tensor(scene.background).expand_as(towards).clone()
    point = eye + distance[found, None] * towards[found]
    n, paint = normal[found], bodies.paint(index[found], local[found])
    lamp = torch.nn.functional.normalize(n.new_tensor(scene.lamp.towards), dim=-1)
    lit = (n @ lamp).clamp_min(0)
    shaded = bodies.hit(point + AWAY * n, lamp.expand_as(n))[2] >= 0
    lit = torch.where(shaded, 0.0, lit)
    half = torch.nn.functional.normalize(lamp - towards[found], dim=-1)
    gleam = bodies.shine[index[found]] * (n * half).sum(-1).clamp_min(0) ** 32 * (lit > 0)
    light = scene.lamp.ambient + (1 - scene.lamp.ambient) * lit
    color[found] = (paint * light[:, None] + gleam[:, None]).clamp(0, 1)
    return color


class _Bodies:
    """The solids as tensors, those of a kind together."""

    def __init__(self, scene: Scene, dtype: torch.dtype, device: torch.device) -> None:
        self.solids = sorted(scene.solids, key=lambda solid: list(KINDS).index(solid.kind))
        if not self.solids:
            raise ValueError("a scene needs at least one solid")

        def stacked(values: list) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.position = stacked([s.position for s in self.solids])
        self.rotation = rotations(stacked([s.rotation for s in self.solids]))  # own to world
        self.size = stacked([[*s.size, 0.0, 0.0][:3] for s in self.solids])
        self.color, self.other = (
            stacked([getattr(s, k) for s in self.solids]) for k in ("color", "other")
        )
        self.width, self.shine = (
            stacked([getattr(s, k) for s in self.solids]) for k in ("width", "shine")
        )
        self.pattern = torch.tensor([PATTERNS.index(s.pattern) for s in self.solids], device=device)
        self.ids = torch.tensor([s.id for s in self.solids], device=device)
        self.kinds = [s.kind for s in self.solids]

    def hit(self, origin: Float[Tensor, "r 3"], towards: Float[Tensor, "r 3"]):
        """Distance (infinite without), normal, index (-1 without) and place in its own frame of
        what each ray meets first."""
        o = torch.einsum("mji,rmj->rmi", self.rotation, origin[:, None] - self.position)
        d = torch.einsum("mji,rj->rmi", self.rotation, towards)
        distances = torch.full(o.shape[:2], math.inf, dtype=o.dtype, device=o.device)
        for kind, meet in MEETINGS.items():
            own = [i for i, name in enumerate(self.kinds) if name == kind]
            if own:
                part = slice(own[0], own[-1] + 1)
                distances[:, part] = meet(o[:, part], d[:, part], self.size[part])
        distance, index = distances.min(1)
        row = torch.arange(len(o), device=o.device)
        met = distance.isfinite()
        local = o[row, index] + torch.where(met, distance, 0.0)[:, None] * d[row, index]
        outwards = self.normal(index, local)
        normal = torch.einsum("rij,rj->ri", self.rotation[index], outwards)
        normal = torch.where((normal * towards).sum(-1, keepdim=True) > 0, -normal, normal)
        normal = torch.where(met[:, None], normal, 0.0)
        return distance, normal, torch.where(met, index, NOTHING), local

    def normal(self, index: Tensor, local: Tensor) -> Tensor:
        """Outwards, in the solid's own frame."""
        found = torch.zeros_like(local)
        for kind, normal in NORMALS.items():
            own = torch.tensor([name == kind for name in self.kinds], device=local.device)[index]
            if own.any():
                found[own] = normal(local[own], self.size[index[own]])
        return found

    def paint(self, index: Tensor, local: Tensor) -> Float[Tensor, "r 3"]:
        """Colour of the surface at a place of its own frame."""
        cell = torch.floor(local / self.width[index][:, None] + 1e-4)
        odd = torch.where(self.pattern[index] == 1, cell.sum(-1), cell[:, 2]).remainder(2) == 1
        odd &= self.pattern[index] > 0
        return torch.where(odd[:, None], self.other[index], self.color[index])


def _first(*candidates: tuple[Tensor, Tensor]) -> Tensor:
    """The least distance in front of the origin whose condition holds."""
    best = torch.full_like(candidates[0][0], math.inf)
    for distance, holds in candidates:
        best = torch.where(holds & (distance > 1e-9) & (distance < best), distance, best)
    return best


def _roots(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a t^2 + 2 b t + c, the smaller first, and whether there are any."""
    inside = b * b - a * c
    root = inside.clamp_min(0).sqrt()
    a = torch.where(a.abs() < 1e-12, 1e-12, a)
    return (-b - root) / a, (-b + root) / a, inside > 0


def _sphere(o: Tensor, d: Tensor, size: Tensor) -> Tensor:
    near, far, any_ = _roots((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - size[:, 0] ** 2)
    return _first((near, any_), (far, any_))


def _box(o: Tensor, d: Tensor, size: Tensor) -> Tensor:
    d = torch.where(d.abs() < 1e-12, 1e-12, d)
    one, two = (-size - o) / d, (size - o) / d
    near, far = torch.minimum(one, two).amax(-1), torch.maximum(one, two).amin(-1)
    return _first((near, near < far), (far, near < far))


def _round_side(o: Tensor, d: Tensor, size: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Where the side of a cylinder is met, between its ends."""
    flat = slice(0, 2)
    near, far, any_ = _roots(
        (d[..., flat] ** 2).sum(-1), (o[..., flat] * d[..., flat]).sum(-1),
        (o[..., flat] ** 2).sum(-1) - size[:, 0] ** 2,
    )  # fmt: skip
    return [(t, any_ & ((o[..., 2] + t * d[..., 2]).abs() <= size[:, 1])) for t in (near, far)]


def _capsule(o: Tensor, d: Tensor, size: Tensor) -> Tensor:
    found = _round_side(o, d, size)
    for end in (-1, 1):
        p = o - torch.stack([torch.zeros_like(size[:, 1])] * 2 + [end * size[:, 1]], dim=-1)
        near, far, any_ = _roots(
            (d * d).sum(-1), (p * d).sum(-1), (p * p).sum(-1) - size[:, 0] ** 2
        )
        for t in (near, far):
            found.append((t, any_ & (end * (o[..., 2] + t * d[..., 2]) >= size[:, 1])))
    return _first(*found)


def _flat(o: Tensor, d: Tensor, radius: Tensor, z: Tensor | float) -> tuple[Tensor, Tensor]:
    """Where a disc at height z is met."""
    t = (z - o[..., 2]) / torch.where(d[..., 2].abs() < 1e-12, 1e-12, d[..., 2])
    at = o[..., :2] + t[..., None] * d[..., :2]
    return t, (at * at).sum(-1) <= radius**2


def _cylinder(o: Tensor, d: Tensor, size: Tensor) -> Tensor:
    ends = [_flat(o, d, size[:, 0], end * size[:, 1]) for end in (-1, 1)]
    return _first(*_round_side(o, d, size), *ends)


def _disc(o: Tensor, d: Tensor, size: Tensor) -> Tensor:
    return _first(_flat(o, d, size[:, 0], 0.0))


MEETINGS = {
    "sphere": _sphere, "box": _box, "capsule": _capsule, "cylinder": _cylinder, "disc": _disc,
}  # fmt: skip


def _along_z(local: Tensor, half: Tensor) -> Tensor:
    """From the nearest point of a segment along z."""
    z = local[:, 2].clamp(min=-half, max=half)
    return torch.nn.functional.normalize(local - torch.stack([0 * z, 0 * z, z], dim=-1), dim=-1)


def _box_normal(local: Tensor, size: Tensor) -> Tensor:
    axis = (local.abs() - size).argmax(-1)
    unit = torch.eye(3, dtype=local.dtype, device=local.device)[axis]
    return unit * local.gather(-1, axis[:, None]).sign()


def _cylinder_normal(local: Tensor, size: Tensor) -> Tensor:
    radius = local[:, :2].norm(dim=-1)
    flat = (local[:, 2].abs() - size[:, 1]) > (radius - size[:, 0])
    up = torch.stack([0 * radius, 0 * radius, local[:, 2].sign()], dim=-1)
    out = torch.cat([local[:, :2], 0 * radius[:, None]], dim=-1)
    return torch.where(flat[:, None], up, torch.nn.functional.normalize(out, dim=-1))


NORMALS = {
    "sphere": lambda local, size: torch.nn.functional.normalize(local, dim=-1),
    "box": _box_normal,
    "capsule": lambda local, size: _along_z(local, size[:, 1]),
    "cylinder": _cylinder_normal,
    "disc": lambda local, size: torch.tensor([0.0, 0.0, 1.0]).to(local).expand_as(local),
}
