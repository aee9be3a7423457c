"""`python -m kernels.parity`: the kernels of every op against their definitions, on random inputs.

    TRITON_INTERPRET=1 python -m kernels.parity               interpreted on the CPU, small inputs
    python -m kernels.parity impl=triton                      on a GPU, large ones
    python -m kernels.parity impl=triton ops=attention count=200 repeats=20
    ... write=true                                            and record it for the README

repeats: run every case that often and ask for the same bits. Exit code 1 if a case does not hold.
"""

from __future__ import annotations

import sys

from kernels.parity.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
