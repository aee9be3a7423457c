"""Compile one kernel for a chip that need not be there, and report what came out, as JSON.

Its own process for each: a failed assertion of the compiler ends the process. Spills show in the
stack size and in the local loads and stores of the machine code (LDL, STL), never in PTX.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MNEMONICS = (
    "HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCQMMA",
    "UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL", "USETMAXREG",
)  # fmt: skip


def compile_and_report(compilation: dict[str, Any]) -> dict[str, Any]:
    """Registers, stack, shared memory and instruction counts of `launch.Compilation` as a dict."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = compilation["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    names = list(compilation["signature"])
    source = ASTSource(
        fn=kernel,
        signature=compilation["signature"],
        constexprs=compilation["constants"],
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in compilation["divisible"]},
    )
    arch = compilation["arch"]
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    options = {key: compilation[key] for key in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=target, options=options)
    report = {"shared": compiled.metadata.shared, "triton": triton.__version__}
    return report | (nvidia(compiled.asm) if isinstance(arch, int) else amd(compiled.asm))


def nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    """What cuobjdump, which the triton wheel ships, says of the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        dump = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        ]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump[0].stdout + dump[0].stderr)
    if usage is None:
        raise RuntimeError(f"cuobjdump -res-usage said nothing: {dump[0].stdout}{dump[0].stderr}")
    counts = {m: len(re.findall(rf"\b{m}\b", dump[1].stdout)) for m in MNEMONICS}
    counts = {mnemonic: count for mnemonic, count in counts.items() if count}
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "instructions": counts | {"setmaxnreg": asm["ptx"].count("setmaxnreg")},
    }


def amd(asm: dict[str, Any]) -> dict[str, Any]:
    """What the assembler noted for gfx942."""
    text = asm["amdgcn"]

    def noted(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    spills = noted("vgpr_spill_count") + noted("sgpr_spill_count")
    return {
        "registers": noted("vgpr_count"),
        "stack": noted("private_segment_fixed_size"),
        "instructions": {"mfma": text.count("v_mfma"), "spills": spills},
    }


if __name__ == "__main__":
    print(json.dumps(compile_and_report(json.load(sys.stdin))))
