"""PLY as 3D Gaussian Splatting writes it: everything, in float32.

    x y z  nx ny nz  f_dc_0..2  f_rest_0..  opacity  scale_0..2  rot_0..3

Harmonics but the first are by channel: all of red, of green, of blue. Normals are 0. Read are
binary (little-endian) and ASCII files with these numbers in any order and of any type, beside
others.
"""

from __future__ import annotations

import io
import re

import numpy as np

from training.formats.gaussians import MOST, Splats

TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "<i2", "int16": "<i2",
    "ushort": "<u2", "uint16": "<u2", "int": "<i4", "int32": "<i4", "uint": "<u4", "uint32": "<u4",
    "float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8",
}  # fmt: skip
FIXED = ["x", "y", "z", *(f"f_dc_{i}" for i in range(3)), "opacity",
         *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]  # fmt: skip
LONGEST_HEADER = 1 << 16


def serialise(splats: Splats) -> bytes:
    rest = splats.sh[:, 1:].transpose(0, 2, 1).reshape(len(splats), 3 * (splats.sh.shape[1] - 1))
    columns = {
        "xyz": splats.means, "normal": np.zeros_like(splats.means), "dc": splats.sh[:, 0],
        "rest": rest, "opacity": splats.opacities[:, None], "scale": splats.scales,
        "rot": splats.quats,
    }  # fmt: skip
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3)),
             *(f"f_rest_{i}" for i in range(rest.shape[1])), "opacity",
             *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]  # fmt: skip
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(splats)}",
              *(f"property float {name}" for name in names), "end_header", ""]  # fmt: skip
    rows = np.concatenate(list(columns.values()), axis=1).astype("<f4")
    return "\n".join(header).encode() + rows.tobytes()


def parse(content: bytes) -> Splats:
    """Raises ValueError for anything but a whole file of Gaussians."""
    found = table(content)
    if missing := [name for name in FIXED if name not in found]:
        raise ValueError(f"it has no {', '.join(missing)}: these are points, and no Gaussians")
    return _splats(found)


def table(content: bytes) -> dict[str, np.ndarray]:
    """Numbers of all vertices by name, whatever they are. Raises ValueError if some lack."""
    head, body = _split(content)
    form, count, properties = _header(head)
    names = [name for name, _ in properties]
    if form == "ascii":
        if not count:
            return {name: np.zeros(0) for name in names}
        values = np.loadtxt(io.BytesIO(body), dtype=np.float64, max_rows=count, ndmin=2)
        if values.shape != (count, len(names)):
            raise ValueError(f"{list(values.shape)} numbers, its header says {[count, len(names)]}")
        return {name: values[:, i] for i, name in enumerate(names)}
    layout = np.dtype(properties)
    if len(body) < count * layout.itemsize:
        raise ValueError(f"{len(body)} bytes of numbers, its header says {count * layout.itemsize}")
    rows = np.frombuffer(body, layout, count)
    return {name: rows[name] for name in names}


def _split(content: bytes) -> tuple[str, bytes]:
    end = re.search(rb"end_header[^\n]{0,2}\n", content[:LONGEST_HEADER])
    if not content.startswith(b"ply") or end is None:
        raise ValueError("it does not begin with a header of PLY")
    return content[: end.start()].decode("ascii", errors="replace"), content[end.end() :]


def _header(head: str) -> tuple[str, int, list[tuple[str, str]]]:
    """Format, number of vertices, their properties with types of numpy."""
    form, count, properties, element = "", -1, [], ""
    for line in head.splitlines()[1:]:
        match line.split():
            case [] | ["comment", *_] | ["obj_info", *_]:
                continue
            case ["format", name, *_]:
                form = name
            case ["element", name, number]:
                if element == "" and name != "vertex":
                    raise ValueError(f"its first element is {name}, not vertex")
                element = name
                if name == "vertex":
                    count = int(number)
            case ["property", kind, name] if kind in TYPES:
                if element == "vertex":
                    properties.append((name, TYPES[kind]))
            case ["property", *_] if element != "vertex":
                continue
            case _:
                raise ValueError(f"its header has a line that is not understood: {line.strip()!r}")
    if form not in ("ascii", "binary_little_endian"):
        raise ValueError(
            f"its format is {form or 'not said'}: ascii or binary_little_endian is read"
        )
    if not 0 <= count <= MOST:
        raise ValueError(f"its header says {count} vertices")
    return form, count, properties


def _splats(table: dict[str, np.ndarray]) -> Splats:
    def columns(*names: str) -> np.ndarray:
        return np.stack([table[name].astype(np.float32) for name in names], axis=-1)

    rest = sorted((n for n in table if n.startswith("f_rest_")), key=lambda n: int(n[7:]))
    if len(rest) not in (0, 9, 24, 45):
        raise ValueError(f"{len(rest)} numbers f_rest_, not 0, 9, 24 or 45")
    sh = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    if rest:
        more = columns(*rest).reshape(len(sh), 3, len(rest) // 3).transpose(0, 2, 1)
        sh = np.concatenate([sh, more], axis=1)
    return Splats(
        columns("x", "y", "z"), columns("rot_0", "rot_1", "rot_2", "rot_3"),
        columns("scale_0", "scale_1", "scale_2"), table["opacity"].astype(np.float32), sh,
    )  # fmt: skip
