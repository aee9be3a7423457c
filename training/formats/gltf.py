"""Binary glTF with KHR_gaussian_splatting (Khronos, ratified): everything, in float32.

Points with the attributes ROTATION (xyzw), SCALE (linear), OPACITY (from 0 to 1) and
SH_DEGREE_d_COEF_n, and a colour for programs that know only points. glTF's y points up: a node
turns the scene, whose z does, so that the numbers are those of the scene.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from kernels.splats.harmonics import Y0
from training.formats.gaussians import MOST, Splats, sigmoid

NAME = "KHR_gaussian_splatting"
MAGIC, JSON, BIN = 0x46546C67, 0x4E4F534A, 0x004E4942
FLOAT, POINTS = 5126, 0
KINDS = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}
UPRIGHT = [-(0.5**0.5), 0.0, 0.0, 0.5**0.5]
"Quaternion xyzw that turns z, which is up in the scene, to glTF's y."


def serialise(splats: Splats) -> bytes:
    opacity = sigmoid(splats.opacities).astype(np.float32)
    color = np.clip(0.5 + Y0 * splats.sh[:, 0], 0, 1)
    q = splats.unit_quats()[:, [1, 2, 3, 0]]
    arrays = {
        "POSITION": splats.means, "COLOR_0": np.concatenate([color, opacity[:, None]], axis=1),
        f"{NAME}:ROTATION": q, f"{NAME}:SCALE": np.exp(splats.scales), f"{NAME}:OPACITY": opacity,
    }  # fmt: skip
    for degree in range(splats.degree + 1):
        for n in range(2 * degree + 1):
            arrays[f"{NAME}:SH_DEGREE_{degree}_COEF_{n}"] = splats.sh[:, degree**2 + n]
    blob, views, accessors = b"", [], []
    for name, x in arrays.items():
        x = np.ascontiguousarray(x, "<f4")
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": x.nbytes})
        width = x.shape[1] if x.ndim == 2 else 1
        accessor: dict[str, Any] = {
            "bufferView": len(accessors), "componentType": FLOAT, "count": len(x),
            "type": KINDS[width],
        }  # fmt: skip
        if name == "POSITION" and len(x):
            accessor |= {"min": x.min(0).tolist(), "max": x.max(0).tolist()}
        accessors.append(accessor)
        blob += x.tobytes()
    about = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display", "projection": "perspective",
             "sortingMethod": "cameraDistance"}  # fmt: skip
    primitive = {"mode": POINTS, "attributes": {name: i for i, name in enumerate(arrays)},
                 "extensions": {NAME: about}}  # fmt: skip
    document = {
        "asset": {"version": "2.0", "generator": "afferent"}, "extensionsUsed": [NAME],
        "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0, "rotation": UPRIGHT}],
        "meshes": [{"primitives": [primitive]}], "buffers": [{"byteLength": len(blob)}],
        "bufferViews": views, "accessors": accessors,
    }  # fmt: skip
    text = json.dumps(document, separators=(",", ":")).encode()
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
        attributes = _attributes(document)
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
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its document lacks {error}") from None


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
