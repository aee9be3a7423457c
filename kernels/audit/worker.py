"""Compile kernels for chips that need not be there, and report what came out, as lines of JSON.

A process of its own, since a failed assertion of the compiler ends it; `Worker` starts another
then. Spills show in the stack size and in the local loads and stores of the machine code (LDL,
STL), never in PTX.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MNEMONICS = (
    "HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCQMMA",
    "UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL", "USETMAXREG",
)  # fmt: skip


class Worker:
    """A process that compiles one kernel after the other; one that has died is replaced."""

    def __init__(self, command: tuple[str, ...] = ("-m", "kernels.audit.worker")) -> None:
        self.command, self.process = command, None

    def report(self, compilation: Mapping[str, Any], timeout_s: float = 300) -> dict[str, Any]:
        """What `compile_and_report` returns, or {"error": its last words}."""
        if self.process is None or self.process.poll() is not None:
            self.close()
            self.process = self.started()
        process, late = self.process, threading.Event()
        assert process.stdin is not None and process.stdout is not None

        def kill() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)  # also the assembler that it may wait for

        timer = threading.Timer(timeout_s, kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(compilation) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            if late.is_set():  # just then
                self.close()
            return json.loads(line)
        code = self.close()
        if late.is_set():
            return {"error": f"compiling took more than {timeout_s:.0f} s"}
        self.words.seek(0)
        words = [line for line in self.words.read().splitlines() if line.strip()]
        return {"error": words[-1].strip() if words else f"exit code {code}"}

    def started(self) -> subprocess.Popen[str]:
        """A fresh process."""
        # What the audit compiles must not depend on how tests interpret.
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (for as long as the process)
        return subprocess.Popen(
            [sys.executable, *self.command],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
            start_new_session=True,
        )

    def close(self) -> int | None:
        """Let the process end; its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.communicate()
        return process.returncode


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


def main() -> None:
    """A report for each line of the standard input, where nothing else is printed to."""
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # what compilers and assemblers print themselves
    for line in sys.stdin:
        try:
            report = compile_and_report(json.loads(line))
        except Exception as error:
            report = {"error": (str(error).strip() or type(error).__name__).splitlines()[-1]}
        print(json.dumps(report), file=out, flush=True)


if __name__ == "__main__":
    main()
