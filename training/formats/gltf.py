"""Binary glTF with KHR_gaussian_splatting (Khronos, ratified): everything, in float32.

Points with the attributes ROTATION (xyzw), SCALE (linear), OPACITY (from 0 to 1) and
SH_DEGREE_d_COEF_n, and a colour for programs that know only points. glTF's y points up: a node
turns the scene, whose z does, so that the numbers are those of the scene. Of a scene whose parts
move each part is a mesh, and a node that an animation moves and turns.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from kernels.splats.harmonics import Y0
from training.formats.gaussians import MOST, Splats, sigmoid

NAME = "KHR_gaussian_splatting"
MAGIC, JSON, BIN = 0x46546C67, 0x4E4F534A, 0x004E4942
FLOAT, POINTS = 5126, 0
KINDS = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}
UPRIGHT = [-(0.5**0.5), 0.0, 0.0, 0.5**0.5]
"Quaternion xyzw that turns z, which is up in the scene, to glTF's y."


@dataclass(frozen=True)
class Motion:
    """Rigid parts of a scene and where each is over time."""

    parts: tuple[Splats, ...]
    "Each in a frame of its own."
    names: tuple[str, ...]
    times: Float32[np.ndarray, " t"]
    "Seconds, rising."
    poses: Float32[np.ndarray, "p t 7"]
    "Position and quaternion wxyz of every frame."


class _Numbers:
    """What a document's accessors reach."""

    def __init__(self) -> None:
        self.blob, self.views, self.accessors = b"", [], []

    def add(self, x: np.ndarray, bounded: bool = False) -> int:
        """Number of the accessor of rows of float32."""
        x = np.ascontiguousarray(x, "<f4")
        self.views.append({"buffer": 0, "byteOffset": len(self.blob), "byteLength": x.nbytes})
        accessor: dict[str, Any] = {
            "bufferView": len(self.accessors), "componentType": FLOAT, "count": len(x),
            "type": KINDS[x.shape[1] if x.ndim == 2 else 1],
        }  # fmt: skip
        if bounded and len(x):
            low, high = (np.atleast_1d(end).tolist() for end in (x.min(0), x.max(0)))
            accessor |= {"min": low, "max": high}
        self.accessors.append(accessor)
        self.blob += x.tobytes()
        return len(self.accessors) - 1

    def mesh(self, splats: Splats) -> dict[str, Any]:
        opacity = sigmoid(splats.opacities).astype(np.float32)
        color = np.clip(0.5 + Y0 * splats.sh[:, 0], 0, 1)
        arrays = {
            "POSITION": splats.means, "COLOR_0": np.concatenate([color, opacity[:, None]], axis=1),
            f"{NAME}:ROTATION": splats.unit_quats()[:, [1, 2, 3, 0]],
            f"{NAME}:SCALE": np.exp(splats.scales), f"{NAME}:OPACITY": opacity,
        }  # fmt: skip
        for degree in range(splats.degree + 1):
            for n in range(2 * degree + 1):
                arrays[f"{NAME}:SH_DEGREE_{degree}_COEF_{n}"] = splats.sh[:, degree**2 + n]
        attributes = {name: self.add(x, name == "POSITION") for name, x in arrays.items()}
        about = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display",
                 "projection": "perspective", "sortingMethod": "cameraDistance"}  # fmt: skip
        primitive = {"mode": POINTS, "attributes": attributes, "extensions": {NAME: about}}
        return {"primitives": [primitive]}


def serialise(splats: Splats) -> bytes:
    """A scene that stands still."""
    numbers = _Numbers()
    mesh = numbers.mesh(splats)
    return _packed(numbers, [mesh], [{"mesh": 0, "rotation": UPRIGHT}], [])


def serialise_moving(motion: Motion) -> bytes:
    """A scene whose parts move, as an animation of one node each: what is drawn is sent once.

    Raises:
        ValueError: times that do not rise, or numbers of parts that differ.
    """
    count = len(motion.parts)
    if motion.poses.shape != (count, len(motion.times), 7) or len(motion.names) != count:
        raise ValueError(
            f"{count} parts, {len(motion.names)} names and poses {list(motion.poses.shape)} do not "
            f"belong together at {len(motion.times)} times"
        )
    if not len(motion.times) or (np.diff(motion.times) <= 0).any():
        raise ValueError("times must rise")
    numbers = _Numbers()
    meshes = [numbers.mesh(part) for part in motion.parts]
    nodes: list[dict[str, Any]] = [{"rotation": UPRIGHT, "children": list(range(1, count + 1))}]
    when, samplers, channels = numbers.add(motion.times, bounded=True), [], []
    for i, (name, poses) in enumerate(zip(motion.names, motion.poses, strict=True)):
        turns = _shortest(poses[:, 3:])[:, [1, 2, 3, 0]]
        nodes.append({"name": name, "mesh": i, "translation": poses[0, :3].tolist(),
                      "rotation": turns[0].tolist()})  # fmt: skip
        for path, x in (("translation", poses[:, :3]), ("rotation", turns)):
            target = {"node": i + 1, "path": path}
            channels.append({"sampler": len(samplers), "target": target})
            samplers.append({"input": when, "output": numbers.add(x), "interpolation": "LINEAR"})
    animation = {"name": "motion", "samplers": samplers, "channels": channels}
    return _packed(numbers, meshes, nodes, [animation])


def _shortest(q: np.ndarray) -> np.ndarray:
    """Quaternions of length 1, each the one of its two that is nearer to that before."""
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    flips = np.where((q[1:] * q[:-1]).sum(1) < 0, -1.0, 1.0)
    return (q * np.concatenate([[1.0], np.cumprod(flips)])[:, None]).astype(np.float32)


def _packed(numbers: _Numbers, meshes: list, nodes: list, animations: list) -> bytes:
    """A whole file; its first node is the scene."""
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "afferent"}, "extensionsUsed": [NAME],
        "scene": 0, "scenes": [{"nodes": [0]}], "nodes": nodes, "meshes": meshes,
        "buffers": [{"byteLength": len(numbers.blob)}], "bufferViews": numbers.views,
        "accessors": numbers.accessors,
    }  # fmt: skip
    document |= {"animations": animations} if animations else {}
    text, blob = json.dumps(document, separators=(",", ":")).encode(), numbers.blob
    text += b" " * (-len(text) % 4)
    size = 12 + 8 + len(text) + 8 + len(blob)
    return b"".join([
        struct.pack("<III", MAGIC, 2, size), struct.pack("<II", len(text), JSON), text,
        struct.pack("<II", len(blob), BIN), blob,
    ])  # fmt: skip


def parse(content: bytes) -> Splats:
    """Of the first primitive of Gaussians, in its own axes, whatever its node says.

    Raises:
        ValueError: no such primitive, or what is cut short or does not belong together.
    """
    document, blob = _chunks(content)
    try:
        return _splats(document, blob, _attributes(document))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its document lacks {error}") from None


def parse_moving(content: bytes) -> Motion:
    """Of the first animation, which must move nodes of Gaussians on straight lines, all at the same
    times.

    Raises:
        ValueError: no such animation, or what is cut short or does not belong together.
    """
    document, blob = _chunks(content)
    try:
        animation, nodes = document["animations"][0], document["nodes"]
        tracks: dict[int, dict[str, np.ndarray]] = {}
        inputs = set()
        for channel in animation["channels"]:
            sampler, target = animation["samplers"][channel["sampler"]], channel["target"]
            if sampler.get("interpolation", "LINEAR") != "LINEAR":
                raise ValueError(
                    f"interpolation {sampler['interpolation']} is not known, LINEAR is"
                )
            inputs.add(sampler["input"])
            tracks.setdefault(target["node"], {})[target["path"]] = _array(
                document, blob, sampler["output"]
            )
        if len(inputs) != 1:
            raise ValueError("its nodes move at times of their own")
        parts, names, poses = [], [], []
        for node, track in sorted(tracks.items()):
            primitive = document["meshes"][nodes[node]["mesh"]]["primitives"][0]
            parts.append(_splats(document, blob, primitive["attributes"]))
            names.append(str(nodes[node].get("name", node)))
            turns = track["rotation"][:, [3, 0, 1, 2]]
            poses.append(np.concatenate([track["translation"], turns], axis=1))
        times = _array(document, blob, inputs.pop())[:, 0]
        if any(len(way) != len(times) for way in poses):
            raise ValueError("a node has more or fewer places than there are times")
        return Motion(tuple(parts), tuple(names), times, np.stack(poses))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its document lacks {error}") from None


def _splats(document: dict[str, Any], blob: bytes, attributes: dict[str, int]) -> Splats:
    """Of a primitive."""
    arrays = {name: _array(document, blob, index) for name, index in attributes.items()}
    sh = [arrays[f"{NAME}:SH_DEGREE_0_COEF_0"]]
    for degree in (1, 2, 3):
        names = [f"{NAME}:SH_DEGREE_{degree}_COEF_{n}" for n in range(2 * degree + 1)]
        if names[0] not in arrays:
            break
        sh += [arrays[name] for name in names]
    opacity = np.clip(arrays[f"{NAME}:OPACITY"][:, 0], 1e-7, 1 - 1e-7)
    scale = np.maximum(arrays[f"{NAME}:SCALE"], 1e-30)
    return Splats(
        arrays["POSITION"], arrays[f"{NAME}:ROTATION"][:, [3, 0, 1, 2]], np.log(scale),
        np.log(opacity / (1 - opacity)), np.stack(sh, axis=1),
    )  # fmt: skip


def _chunks(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The document and the numbers."""
    if len(content) < 20 or struct.unpack_from("<II", content) != (MAGIC, 2):
        raise ValueError("it does not begin as binary glTF 2.0 does")
    (size,) = struct.unpack_from("<I", content, 8)
    if len(content) < size:
        raise ValueError(f"{len(content)} bytes, its header says {size}")
    found, at = {}, 12
    while at + 8 <= size:
        length, kind = struct.unpack_from("<II", content, at)
        if at + 8 + length > size:
            raise ValueError("a part of it is cut short")
        found.setdefault(kind, content[at + 8 : at + 8 + length])
        at += 8 + length
    try:
        document = json.loads(found[JSON])
        if not isinstance(document, dict):
            raise ValueError("no object")
    except (KeyError, ValueError, RecursionError):
        raise ValueError("its document is no JSON") from None
    return document, found.get(BIN, b"")


def _attributes(document: dict[str, Any]) -> dict[str, int]:
    for node in document.get("nodes", []):
        for primitive in document["meshes"][node["mesh"]]["primitives"] if "mesh" in node else []:
            if NAME in primitive.get("extensions", {}):
                return primitive["attributes"]
    raise ValueError(f"it has no mesh of {NAME}")


def _array(document: dict[str, Any], blob: bytes, index: int) -> np.ndarray:
    """[n, width] float32 of an accessor."""
    accessor = document["accessors"][index]
    widths = {kind: width for width, kind in KINDS.items()}
    count, width = accessor["count"], widths[accessor["type"]]
    if accessor["componentType"] != FLOAT or "sparse" in accessor or not 0 <= count <= MOST:
        raise ValueError("an attribute is not float32, or too long")
    view = document["bufferViews"][accessor["bufferView"]]
    step = view.get("byteStride", 4 * width)
    begin = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    end = begin + (count - 1) * step + 4 * width if count else begin
    if not 0 <= begin <= end <= len(blob) or step < 4 * width:
        raise ValueError("an attribute reaches beyond the file's numbers")
    if not count:
        return np.zeros((0, width), np.float32)
    return np.ndarray((count, width), "<f4", blob, begin, (step, 4)).astype(np.float32)
