"""Every tile of KV compaction, on its chip: scores of ragged requests, and the gather."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.audit.spec import Spec, specs_of
from kernels.kv_cache.compaction.launch import expected, gather, window
from kernels.tiles import Row, rows

R, S, H, KV, W, PAGE = 4, 32768, 32, 8, 64, 16


def specs() -> Iterator[Spec]:
    for table, calls in CALLS.items():
        for row in rows(table):
            if row.arch != 0:
                for name, call, tensor_cores in calls(row):
                    yield from specs_of(row, (table,), call, name, tensor_cores)


def scores(row: Row) -> tuple[str, Tensor, Tensor, str | None]:
    """A label, keys [r, s, kv, d], lengths, and which tensor cores the row's dtype uses."""
    # float32 is multiplied exactly, without tensor cores.
    exact, d = row.keys["bytes"] == 4, row.keys["head_dim"]
    k = meta(R, S, KV, d, dtype=torch.float32 if exact else torch.bfloat16)
    label = f"{'float32' if exact else 'bfloat16'} d{d}"
    return label, k, meta(R, dtype=torch.int32), None if exact else "wide"


def window_calls(row: Row) -> Iterator[tuple[str, partial, dict[str, str | None]]]:
    label, k, lengths, cores = scores(row)
    q = meta(R, W, H, k.shape[3], dtype=k.dtype)
    call = partial(window, q, k, lengths, 0.1)
    yield label, call, {"window_lse": cores, "window_scores": cores}


def expected_calls(row: Row) -> Iterator[tuple[str, partial, dict[str, str | None]]]:
    label, k, lengths, cores = scores(row)
    d = k.shape[3]
    mean, covariance = meta(R, H, d, dtype=torch.float32), meta(R, H, d, d, dtype=torch.float32)
    call = partial(expected, mean, covariance, k, lengths, 0.1)
    yield label, call, {"expected_logits": cores}


def gather_calls(row: Row) -> Iterator[tuple[str, partial, dict[str, str | None]]]:
    """The widest keys, rotated, and codes with their scales: a row serves values of any width."""
    integers = partial(meta, dtype=torch.int32)
    index = (integers(R, S // PAGE), integers(R, KV, 1024), integers(R, KV), integers(R * KV, 64))
    d = row.keys["head_dim"]
    angles = meta(S, d, dtype=torch.float32)
    data = meta(4096, 2, PAGE, KV, d, dtype=torch.float32)
    yield f"float32 d{d} rotated", partial(gather, data, None, *index, angles, angles), NO_DOT
    data, scales = data.to(torch.int8), meta(4096, 2, PAGE, KV, dtype=torch.float32)
    yield f"int8 d{d}", partial(gather, data, scales, *index, None, None), NO_DOT


NO_DOT = {"gather_kept": None}
CALLS = {
    "kv_window": window_calls,
    "kv_expected": expected_calls,
    "kv_gather": gather_calls,
}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
