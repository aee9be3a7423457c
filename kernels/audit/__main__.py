"""`python -m kernels.audit`: compile every shipped tile for its chip, without a GPU, and judge it.

    python -m kernels.audit                          every op, the installed Triton
    python -m kernels.audit ops=attention arch=90    some of it
    python -m kernels.audit tiles=heaviest           of each kernel the tile with most registers
    python -m kernels.audit write=true               and record it for the README

A tile passes if it does not spill (stack 0, no local loads or stores), fits its chip's shared
memory, and uses what it is meant to: tensor cores, TMA where it reads through descriptors,
setmaxnreg where it splits warps. Registers may exceed what was recorded for this Triton version by
8. A known spiller, a tile too large for its chip and one whose warps are not split though it says
so are compiled too, and must fail. Exit code 1 if anything does not come out so.
"""

from __future__ import annotations

import sys

from kernels.audit.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
