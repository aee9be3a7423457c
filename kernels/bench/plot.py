"""The roofline of a results file, and its targets: SVG and PNG, from the JSON alone.

Left: achieved TFLOP/s over the arithmetic intensity (FLOP per byte that must move); the roof is
what this machine's copy and matmul measured in the same call. Right: each target's ratio over what
was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.bench import results
from kernels.bench.results import Document, Row
from kernels.bench.table import baseline

COLOURS = {
    "attention": "#0072B2",
    "decode": "#D55E00",
    "cascade": "#CC79A7",
    "append": "#009E73",
    "compaction": "#E69F00",
    "loss": "#56B4E9",
    "fast_weights": "#F0E442",
    "sigreg": "#000000",
    "splats": "#999999",
}
"By suite: Okabe and Ito's palette, which colour-blind readers can tell apart."


TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)


def points(document: Document) -> list[tuple[str, float, float, bool]]:
    """suite, FLOP per byte, TFLOP/s, whether it is ours: for each case ours and the best peer."""
    found = []
    for row in document["cases"]:
        ours = baseline(row) if row["complete"] else None
        if ours is None or row["through_host"] or not row["flops"]:
            continue  # what computes nothing has no place on a roofline
        suite = row["case"].partition("/")[0]
        found.append((suite, *_at(row, ours), True))
        peers = [e for e in results.timed(row).values() if not e["ours"]]
        peers = [e for e in peers if "flops" not in e]  # those of the same work
        if peers:
            best = min(peers, key=lambda entry: entry["ms"]["p50"])
            found.append((suite, *_at(row, best), False))
    return found


def _at(row: Row, entry: Row) -> tuple[float, float]:
    flops, moved = entry.get("flops", row["flops"]), entry.get("bytes", row["bytes"])
    return flops / moved, flops / (entry["ms"]["p50"] / 1e3) / 1e12


def draw(document: Document, path: Path) -> list[Path]:
    """Write `path` with the suffixes .svg and .png; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "afferent"  # the same file from the same results
    from matplotlib import pyplot as plt

    judged = [(row, t) for row, t in results.targets(document) if t["value"] is not None]
    height = max(4.6, 0.21 * len(judged) + 1.2)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, height), width_ratios=(1, 0.8), layout="constrained"
    )
    roofline(left, document)
    dots(right, judged)
    call = document["calls"][-1]
    figure.suptitle(f"{call['gpu']['name']}, {call['date'][:10]}", fontsize=11)
    written = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    for file in written:
        figure.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return written


def roofline(axes: Any, document: Document) -> None:
    ceilings = document["calls"][-1]["ceilings"]
    copy, matmul = ceilings["copy"]["rate"], ceilings["matmul"]["rate"]
    found = points(document)
    intensities = [x for _, x, _, _ in found] or [1.0]
    low, high = min(0.3, *intensities) / 2, max(4e3, *intensities) * 2
    ridge = matmul / copy
    axes.plot([low, ridge, high], [low * copy / 1e12, matmul / 1e12, matmul / 1e12], color="0.35")
    axes.annotate(
        f"matmul {matmul / 1e12:.0f} TFLOP/s",
        (high, matmul / 1e12),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="0.35",
    )
    middle = (low * ridge) ** 0.5
    axes.text(
        middle,
        1.25 * middle * copy / 1e12,
        f"copy {copy / 1e12:.2f} TB/s",
        fontsize=8,
        rotation=math.degrees(math.atan(copy / 1e12)),
        transform_rotates_text=True,
        rotation_mode="anchor",
        ha="center",
        color="0.35",
    )
    for suite, colour in COLOURS.items():
        for ours in (True, False):
            here = [(x, y) for s, x, y, mine in found if s == suite and mine == ours]
            if here:
                label = f"{suite}: {'ours' if ours else 'fastest peer'}"
                fill = colour if ours else "none"
                axes.scatter(
                    *zip(*here, strict=True), s=34, facecolors=fill, edgecolors=colour, label=label
                )
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_box_aspect(0.9)
    axes.set_anchor("N")
    axes.set(xlabel="FLOP per byte moved", ylabel="TFLOP/s", title="Roofline of the same call")
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(alpha=0.25, which="both", linewidth=0.4)


def dots(axes: Any, judged: list[tuple[Row, Mapping[str, Any]]]) -> None:
    names = [f"{t['name']}  [{row['case'].partition('/')[2]}]" for row, t in judged]
    ratios = [t["value"] / t["at_least"] for _, t in judged]
    colours = ["#009E73" if t["met"] else "#D55E00" for _, t in judged]
    height = list(range(len(judged)))[::-1]
    axes.axvline(1.0, color="0.35")
    axes.hlines(height, 1.0, ratios, color=colours, linewidth=1.2)
    axes.scatter(ratios, height, c=colours, s=22, zorder=3)
    axes.set_yticks(height, names, fontsize=6.5)
    axes.yaxis.tick_right()
    axes.set(xscale="log", xlabel="ratio / asked for (right of the line: met)", title="Targets")
    axes.set_xticks(ticks := [t for t in TICKS if min([0.7, *ratios]) <= t <= max([1.5, *ratios])])
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25, axis="x", which="both", linewidth=0.4)
