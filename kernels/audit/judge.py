"""What a compiled tile must be, and the tiles that must fail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from kernels.audit.spec import SHARED_MEMORY, TENSOR_CORES, Spec, specs_of
from kernels.tiles import Row, Tile

REGISTER_SLACK = 8
"Registers by which a tile may exceed what was recorded for the same Triton version."

PRODUCTS = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCQMMA", "mfma")
"Mnemonics of tensor-core instructions, of any width."


def faults(spec: Spec, report: Mapping[str, Any], budget: int | None = None) -> list[str]:
    """Everything wrong with a compiled tile; an empty list if it passes.

    Args:
        report: from `worker.compile_and_report`, or {"error": ...} if it did not compile.
        budget: registers recorded for this Triton version, None if there is no record.
    """
    if "error" in report:
        return [f"does not compile: {report['error']}"]
    arch, count = spec.compilation.arch, report["instructions"]
    found = []
    spilled = count.get("LDL", 0) + count.get("STL", 0) + count.get("spills", 0)
    if report["stack"] or spilled:
        found.append(f"spills: stack {report['stack']} B, {spilled} local loads and stores")
    if report["shared"] > SHARED_MEMORY[arch]:
        found.append(f"needs {report['shared']} B of shared memory of {SHARED_MEMORY[arch]} B")
    products = sum(count.get(mnemonic, 0) for mnemonic in PRODUCTS)
    if spec.tensor_cores and not products:
        found.append("has no tensor-core instruction")
    elif spec.tensor_cores == "wide" and isinstance(arch, int):
        own = TENSOR_CORES[arch]
        eight_bit = {"HGMMA": "QGMMA", "UTCHMMA": "UTCQMMA"}.get(own)
        if count.get(own, 0) + count.get(eight_bit, 0) < products:
            found.append(f"uses other tensor-core instructions than {own}: {dict(count)}")
    if spec.compilation.descriptors and not count.get("UTMALDG"):
        found.append("reads through descriptors, but has no UTMALDG")
    if spec.compilation.warp_specialize and not count.get("setmaxnreg"):
        found.append("should specialise warps, but has no setmaxnreg")
    if budget is not None and report["registers"] > budget + REGISTER_SLACK:
        found.append(f"takes {report['registers']} registers, {budget} were recorded")
    return found


def controls() -> Iterator[tuple[Spec, str]]:
    """Tiles that must fail, each with the word that its fault must contain."""
    from kernels.attention.launch import forward
    from kernels.audit.specs.attention import calls

    wrong = {
        "spills": (64, Tile(_blocks(128, 128), num_warps=4, num_stages=3)),
        "shared memory": (
            256,
            Tile(_blocks(128, 128), num_warps=8, num_stages=3, descriptors=True),
        ),
        "setmaxnreg": (  # eight warps: Triton ignores the flag without a word
            128,
            Tile(_blocks(128, 64), 8, 2, descriptors=True, warp_specialize=True),
        ),
    }
    for word, (head_dim, tile) in wrong.items():
        row = Row(90, {"bytes": 2, "head_dim": head_dim, "softcap": 0}, tile)
        name, call = next(calls(row, partial(forward)))
        (spec,) = specs_of(
            row, ("attention_forward",), call, f"control {name}", {"attention_forward": "wide"}
        )
        yield spec, word


def _blocks(m: int, n: int) -> Mapping[str, int]:
    return MappingProxyType({"BLOCK_M": m, "BLOCK_N": n})
