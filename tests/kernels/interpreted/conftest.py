"""These tests interpret the kernels, which a process decides when it imports triton: they run in a
process of their own, started by tests/kernels/test_interpreter.py, or by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
