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
    "attention": "kernels.attention.op",
    "record": "kernels.dispatch",
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
