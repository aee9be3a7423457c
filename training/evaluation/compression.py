"""Compression floors: bits per byte of general-purpose compressors on the held-out part itself.

Unlike the n-gram floors these see no training text: they adapt to what they have compressed so far.
"""

from __future__ import annotations

import gzip
import lzma


def gzip_bits_per_byte(data: bytes) -> float:
    """Bits per byte of gzip level 9 (LZ77 with a 32 kB window, Huffman codes).

    Raises:
        ValueError: if `data` is empty.
    """
    return _bits_per_byte(data, len(gzip.compress(data, compresslevel=9, mtime=0)))


def xz_bits_per_byte(data: bytes) -> float:
    """Bits per byte of xz preset 9 extreme (LZMA2: long matches, context-coded).

    Raises:
        ValueError: if `data` is empty.
    """
    return _bits_per_byte(data, len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)))


def _bits_per_byte(data: bytes, compressed_bytes: int) -> float:
    if not data:
        raise ValueError("there is nothing to compress: the held-out part is empty")
    return 8.0 * compressed_bytes / len(data)
