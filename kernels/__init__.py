"""What makes it fast: one public function per op, right everywhere, fast on a GPU.

    from kernels import attention, record

Each op is a folder: `reference.py` the definition, `triton.py` the kernels, `launch.py` those as
torch operators, `op.py` the public function, which `dispatch.py` lets choose between them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

FUNCTIONS = {
    "Kept": "kernels.kv_cache.compaction.selection",
    "OutOfPages": "kernels.kv_cache.pool",
    "PagePool": "kernels.kv_cache.pool",
    "adaptive_budgets": "kernels.kv_cache.compaction.selection",
    "append_kv": "kernels.kv_cache.append.op",
    "attention": "kernels.attention.op",
    "average_rotation": "kernels.kv_cache.compaction.scores",
    "characteristic_function": "kernels.sigreg.op",
    "compact_kv": "kernels.kv_cache.compaction.op",
    "decode_cascade": "kernels.kv_cache.attention.op",
    "decode_paged": "kernels.kv_cache.attention.op",
    "extend_paged": "kernels.kv_cache.attention.op",
    "gated_delta_rule": "kernels.fast_weights.gated_delta.op",
    "host_cache": "kernels.kv_cache.swap",
    "linear_cross_entropy": "kernels.cross_entropy.op",
    "linear_distillation": "kernels.cross_entropy.op",
    "linear_logprobs": "kernels.cross_entropy.op",
    "merge_states": "kernels.attention.merge",
    "pages_of": "kernels.kv_cache.pool",
    "rasterize": "kernels.splats.op",
    "read_pages": "kernels.kv_cache.compaction.op",
    "record": "kernels.dispatch",
    "score_expected_attention": "kernels.kv_cache.compaction.scores",
    "score_key_norm": "kernels.kv_cache.compaction.scores",
    "score_window_attention": "kernels.kv_cache.compaction.scores",
    "select_top": "kernels.kv_cache.compaction.selection",
    "swap_in": "kernels.kv_cache.swap",
    "swap_out": "kernels.kv_cache.swap",
    "ttt_linear": "kernels.fast_weights.ttt.op",
    "ttt_mlp": "kernels.fast_weights.ttt.op",
}
"Public name -> where it is defined; loaded when it is first asked for."

__all__ = list(FUNCTIONS)


class _Package(ModuleType):
    """Importing the folder `attention` must not hide the function `attention`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in FUNCTIONS:
        raise AttributeError(f"kernels has no {name}: it has {', '.join(__all__)}")
    return getattr(importlib.import_module(FUNCTIONS[name]), name)


sys.modules[__name__].__class__ = _Package
