"""SPZ of Niantic, versions 2 and 3: gzip of a header of 16 bytes and, one after the other,

    places      3 x 24 bits, of 2^-bits (written: 12)
    opacities   8 bits
    colours     3 x 8 bits of the first harmonic, c 0.15 + 0.5
    scales      3 x 8 bits of the logarithm, (s + 10) 16
    rotations   version 2: x, y, z in 8 bits, w >= 0; version 3: which of xyzw is the largest, and
                sign and 9 bits of each of the others, as shares of sqrt(1/2)
    harmonics   8 bits, c 128 + 128, rounded to 5 bits for degree 1 and to 4 above

Axes are right, up, back: y and z point the other way than in the scene. Written is version 3. Lost:
what these bits do not hold, and places further out than 2^23 steps, which are refused.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from itertools import pairwise

import numpy as np

from training.formats.gaussians import MOST, Splats, logit, quantised, sigmoid

MAGIC, VERSION, BITS = 0x5053474E, 3, 12
HEADER = struct.Struct("<IIIBBBB")
COLOR = 0.15
BUCKETS = 8, 16  # of harmonics of degree 1, and above: what 5 and 4 bits of 8 leave
LARGEST = 511 / np.sqrt(0.5)  # a share of 9 bits


def serialise(splats: Splats) -> bytes:
    own, n = splats.mirrored_yz(), len(splats)
    steps = np.round(own.means.astype(np.float64) * 2**BITS)
    if n and np.abs(steps).max() >= 2**23:
        raise ValueError(
            f"a place is {np.abs(own.means).max():g} away, SPZ reaches {2**23 / 2**BITS:g}"
        )
    places = steps.astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3]
    rest = own.sh[:, 1:]
    bucket = np.array([BUCKETS[k >= 3] for k in range(rest.shape[1])], np.int64)[:, None]
    whole = np.round(rest * 128).astype(np.int64) + 128
    harmonics = np.clip((whole + bucket // 2) // bucket * bucket, 0, 255).astype(np.uint8)
    parts = [
        HEADER.pack(MAGIC, VERSION, n, splats.degree, BITS, 0, 0),
        places.tobytes(),
        quantised(255 * sigmoid(own.opacities)).tobytes(),
        quantised(255 * (COLOR * own.sh[:, 0] + 0.5)).tobytes(),
        quantised(16 * (own.scales + 10)).tobytes(),
        _packed(own.unit_quats()).astype("<u4").tobytes(),
        harmonics.tobytes(),
    ]
    return gzip.compress(b"".join(parts), mtime=0)


def parse(content: bytes) -> Splats:
    """Raises ValueError for another version, or what is cut short."""
    header = _unzipped(content, HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{len(header)} bytes, its header has {HEADER.size}")
    magic, version, n, degree, bits, _, _ = HEADER.unpack(header)
    if magic != MAGIC:
        raise ValueError("it does not begin with NGSP")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version}: 2 and 3 are read")
    if degree > 3 or bits > 23 or n > MOST:
        raise ValueError(f"its header says {n} Gaussians, degree {degree}, {bits} bits")
    k, turn = (degree + 1) ** 2 - 1, 3 if version == 2 else 4
    sizes = [9 * n, n, 3 * n, 3 * n, turn * n, 3 * k * n]
    whole = HEADER.size + sum(sizes)
    data = _unzipped(content, whole, to_the_end=True)
    if len(data) < whole:
        raise ValueError(f"{len(data)} bytes, its header says {whole}")
    edges = HEADER.size + np.cumsum([0, *sizes])
    places, opacity, color, scales, rotation, rest = (
        np.frombuffer(data[a:b], np.uint8) for a, b in pairwise(edges)
    )
    wide = np.zeros((3 * n, 4), np.uint8)
    wide[:, 1:] = places.reshape(-1, 3)
    means = (wide.view("<i4")[:, 0] >> 8) / 2**bits  # the sign comes along
    first = (color.reshape(n, 1, 3) / 255.0 - 0.5) / COLOR
    more = (rest.reshape(n, k, 3) - 128.0) / 128
    found = Splats(
        means.reshape(n, 3).astype(np.float32),
        _three(rotation) if version == 2 else _smallest_three(rotation),
        (scales.reshape(n, 3) / 16.0 - 10).astype(np.float32), logit(opacity / 255.0),
        np.concatenate([first, more], axis=1).astype(np.float32),
    )  # fmt: skip
    return found.mirrored_yz()


def _unzipped(content: bytes, most: int, to_the_end: bool = False) -> bytes:
    """The first bytes of what was compressed, and no more; if `to_the_end`, its sum was right."""
    stream = zlib.decompressobj(wbits=31)
    try:
        found = stream.decompress(content, most)
        if to_the_end and len(found) == most:
            stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise ValueError(f"it is not compressed by gzip ({error})") from None
    if to_the_end and not stream.eof:
        raise ValueError("it ends too early, or has more than its header says")
    return found


def _packed(quats: np.ndarray) -> np.ndarray:
    """wxyz of length 1 in 32 bits."""
    q = quats[:, [1, 2, 3, 0]].astype(np.float64)  # xyzw
    row, largest = np.arange(len(q)), np.abs(q).argmax(1)
    q = np.where(q[row, largest][:, None] < 0, -q, q)
    found = largest.astype(np.int64)
    for i in range(4):
        size = np.minimum(np.floor(np.abs(q[:, i]) * LARGEST + 0.5).astype(np.int64), 511)
        found = np.where(
            largest == i, found, found << 10 | (q[:, i] < 0).astype(np.int64) << 9 | size
        )
    return found


def _smallest_three(data: np.ndarray) -> np.ndarray:
    """wxyz of 32 bits each."""
    bits = data.copy().view("<u4").astype(np.int64)
    largest, q = bits >> 30, np.zeros((len(bits), 4))
    for i in (3, 2, 1, 0):
        own = largest == i
        value = (bits & 511) / LARGEST * np.where(bits >> 9 & 1, -1, 1)
        q[:, i] = np.where(own, 0.0, value)
        bits = np.where(own, bits, bits >> 10)
    row = np.arange(len(q))
    q[row, largest] = np.sqrt(np.maximum(0, 1 - (q * q).sum(1)))
    return q[:, [3, 0, 1, 2]].astype(np.float32)


def _three(data: np.ndarray) -> np.ndarray:
    """wxyz of x, y, z in 8 bits each."""
    xyz = data.reshape(-1, 3) / 127.5 - 1
    w = np.sqrt(np.maximum(0, 1 - (xyz * xyz).sum(1, keepdims=True)))
    return np.concatenate([w, xyz], axis=1).astype(np.float32)
