"""Floors of a byte-level language model: n-grams and general-purpose compressors, judged on the
same held-out bytes.

    seen/order_k     n-grams trained on exactly the bytes the model has been trained on
    corpus/order_k   n-grams trained on the whole training corpus
    gzip, xz         the held-out bytes compressed by themselves
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.errors import UserError
from training.evaluation.compression import gzip_bits_per_byte, xz_bits_per_byte
from training.evaluation.ngram import bits_per_byte

if TYPE_CHECKING:
    from training.data.language import LanguageData


def require_bytes(data: LanguageData) -> None:
    """Raise UserError for a corpus on which no floors can be counted."""
    if data.config.tokenizer is not None or data.train is None:
        raise UserError(
            "recipe.floors=true needs a corpus of bytes in memory: set recipe.floors=false, or "
            "data=stdlib or files with data.tokenizer=null"
        )


def language_floors(data: LanguageData, steps: int) -> dict[str, float]:
    """Bits per byte of every floor of a model trained for `steps` steps on `data`.

    Raises UserError for corpora that are not made of bytes in memory.
    """
    require_bytes(data)
    assert data.train is not None
    heldout = [data.heldout.bytes_of(i) for i in range(len(data.heldout.names))]
    floors = {}
    for name, chunks in (("seen", data.seen(steps)), ("corpus", [data.train.tokens])):
        for order, value in enumerate(bits_per_byte(chunks, heldout)):
            floors[f"{name}/order_{order}"] = value
    everything = b"".join(heldout)
    floors["gzip"] = gzip_bits_per_byte(everything)
    floors["xz"] = xz_bits_per_byte(everything)
    return floors
