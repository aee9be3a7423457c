"""Figures as SVG text: learning curves beside their floors, values per seed beside their mean.

One size, one colour-blind palette (Okabe and Ito, 2008), units on every axis, text kept as text.
The same input gives the same bytes. No pyplot, so no display, no backend and no global state;
matplotlib is imported where it is used.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.evaluation.statistics import interval, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH, HEIGHT, TALL = 4.8, 3.2, 4.4  # inches; small, so that 9-point text is readable on a phone
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#222222", "#9a9a9a"
POINTS = 1000  # of a curve
FEW = 10  # whole numbers of an axis that are all written
INSIDE = 4  # curves whose legend finds room among them; that of more stands below
MARKED = 40  # points up to which each is drawn as one
LABEL_GAP = 0.04  # of the axes' height, between two labels of floors

NAMES = {
    "bpb": "bits per byte",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "mfu": "model FLOPs utilisation",
    "step_s": "time per step (s)",
    "train_s": "training time (s)",
}
UNITS = {"_per_s": " per second", "_gb": " (GB)", "_db": " (dB)", "_ms": " (ms)", "_s": " (s)"}


def label(key: str) -> str:
    """`perf/tokens_per_s` -> 'tokens per second': a metric's name with its unit."""
    name = key.rpartition("/")[2]
    if name in NAMES:
        return NAMES[name]
    for ending, unit in UNITS.items():
        if name.endswith(ending):
            return name.removesuffix(ending).replace("_", " ") + unit
    return name.replace("_", " ")


@dataclass(frozen=True)
class Line:
    """One curve; nan where there is no value. `band` is (low, high) at each x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    bound: bool = False  # a floor or a ceiling: dashed, without colour


def curve(rows: Sequence[Mapping[str, Any]], key: str, name: str | None = None) -> Line:
    """The values of `key` over `step`; null, which stands for not finite, leaves a gap."""
    points = [(row["step"], row[key]) for row in rows if key in row and "step" in row]
    stride = -(-len(points) // POINTS)
    points = points[:: max(stride, 1)] + (points[-1:] if stride > 1 else [])
    values = [math.nan if y is None else float(y) for _, y in points]
    return Line(name or key, [x for x, _ in points], values)


def final(runs: Mapping[str, Any], run: str, key: str) -> list[float]:
    """What each seed of a run of results/<scale>.json ended with, where it has such a metric."""
    values = runs.get(run, {}).get("final", {}).get(key, [])
    return [value for value in values if value is not None]


def measured(
    runs: Mapping[str, Any], rows: Mapping[str, tuple[str, str]]
) -> dict[str, list[float]]:
    """Groups of a `dot_chart`: what each (run, metric) ended with, if it was measured."""
    found = {name: final(runs, run, metric) for name, (run, metric) in rows.items()}
    return {name: values for name, values in found.items() if values}


def mean_curve(name: str, x: Sequence[float], seeds: Sequence[Sequence[float | None]]) -> Line:
    """Mean over seeds at each x, with its 95 % interval: of two seeds it would cover the figure."""
    middle, low, high = [], [], []
    for values in zip(*seeds, strict=True):
        known = [float(v) for v in values if v is not None]
        spread = interval(known)
        middle.append(mean(known) if known else math.nan)
        low.append(spread[0] if spread else math.nan)
        high.append(spread[1] if spread else math.nan)
    return Line(name, x, middle, (low, high) if len(seeds) > 2 else None)


def series_curves(
    runs: Mapping[str, Any], names: Mapping[str, str], key: str, end: int | None = None
) -> list[Line]:
    """The mean curve of a series at 1, 2, ... of every run that has it; run -> its name.

    Args:
        end: as of a slice: -1 leaves the last value of each series out.
    """
    return [
        mean_curve(name, range(1, len(seeds[0]) + 1), seeds)
        for run, name in names.items()
        if (seeds := [s[key][:end] for s in runs.get(run, {}).get("series", []) if key in s])
    ]


def styled(draw: Callable[..., str]) -> Callable[..., str]:
    """Draw with the style of this file, whatever matplotlib is set to elsewhere."""

    @functools.wraps(draw)
    def inside(*arguments: Any, **options: Any) -> str:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*arguments, **options)

    return inside


@styled
def line_chart(
    lines: Sequence[Line],
    ylabel: str,
    xlabel: str = "step",
    levels: Mapping[str, float] | None = None,
    from_zero: bool = False,
    log_x: bool = False,
) -> str:
    """Curves, with `levels` (floors, ceilings) as horizontal lines labelled at the right.

    With levels the frame is theirs and the second half of the curves': how high a curve began
    would flatten what is compared. `from_zero` begins the axis at zero, `log_x` has base 2.
    """
    from matplotlib.ticker import MultipleLocator

    levels = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    figure, (axes,) = blank(TALL if levels or len(lines) > INSIDE else HEIGHT)
    looks = itertools.cycle(
        {"color": colour, "linestyle": style, "marker": marker}
        for style, marker in (("-", "o"), (":", "s"), ("-.", "^"))
        for colour in COLOURS
    )
    greys = iter((INK, FAINT) * len(lines))
    for line in lines:
        look = {"color": next(greys), "linestyle": "--"} if line.bound else next(looks)
        draw_line(axes, line, look)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.ticklabel_format(axis="y", useOffset=False)
    places = [x for line in lines for x in line.x]
    if log_x:
        axes.set_xscale("log", base=2)
        plain_ticks(axes.xaxis)
    elif places and max(places) - min(places) < FEW and all(x == int(x) for x in places):
        axes.xaxis.set_major_locator(MultipleLocator(1))
    if levels:
        later = [y for line in lines for y in line.y[len(line.y) // 2 :] if math.isfinite(y)]
        frame(axes, [*levels.values(), *later])
        draw_levels(axes, levels)
    else:
        axes.grid(axis="y", color=FAINT, linewidth=0.4, alpha=0.4)
        if from_zero:
            axes.set_ylim(bottom=0)
        elif wide_range([y for line in lines for y in line.y]):
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
    if len(lines) > INSIDE:
        figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)
    elif len(lines) > 1:
        axes.legend(frameon=False, loc="best")
    return svg(figure)


@styled
def dot_chart(
    groups: Mapping[str, Sequence[float]], xlabel: str, marks: Mapping[str, float] | None = None
) -> str:
    """One row per group: a point per seed, the mean and its 95 % interval; `marks` are vertical."""
    figure, (axes,) = blank(0.9 + 0.34 * max(len(groups), 1))
    draw_dots(axes, groups, xlabel)
    for number, (name, value) in enumerate((marks or {}).items()):
        axes.axvline(value, color=INK, linewidth=0.9, linestyle=("--", ":", "-.")[number % 3])
        axes.plot([], [], color=INK, lw=0.9, ls=("--", ":", "-.")[number % 3], label=name)
    if marks:
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(marks))
    return svg(figure)


@styled
def dot_charts(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A `dot_chart` per metric, one below the other, in one file."""
    height = sum(0.7 + 0.34 * max(len(groups), 1) for groups in panels.values())
    figure, axes = blank(height, rows=len(panels))
    for panel, (key, groups) in zip(axes, panels.items(), strict=True):
        draw_dots(panel, groups, label(key))
    return svg(figure)


def draw_line(axes: Axes, line: Line, look: Mapping[str, str]) -> None:
    shown = [y for y in line.y if math.isfinite(y)]
    if line.bound:
        axes.plot(line.x, line.y, label=line.label, linewidth=1.2, **look)
        return
    marker = look["marker"] if len(shown) <= MARKED else None
    axes.plot(line.x, line.y, label=line.label, markersize=3.5, **{**look, "marker": marker})
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=look["color"], alpha=0.2, linewidth=0)


def plain_ticks(axis: Axis) -> None:
    """0.01 and 1024 on a logarithmic axis: powers would need markup, which names must not have."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def frame(axes: Axes, values: Sequence[float]) -> None:
    """Limits of the y axis, from which label positions can be computed."""
    margin = 0.06 * (max(values) - min(values)) or 0.06 * abs(values[0]) or 1.0
    axes.set_ylim(min(values) - margin, max(values) + margin)


def draw_levels(axes: Axes, levels: Mapping[str, float]) -> None:
    """Horizontal lines whose labels, outside of the axes, keep clear of each other."""
    for value in levels.values():
        axes.axhline(value, color=FAINT, linewidth=0.8, zorder=1)
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {name: to_axes.transform((0, value))[1] for name, value in levels.items()}
    for name, height in spread_out(heights, LABEL_GAP).items():
        axes.annotate(
            name,
            xy=(1, heights[name]),
            xytext=(1.05, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkB": 0},
        )


def draw_dots(axes: Axes, groups: Mapping[str, Sequence[float]], xlabel: str) -> None:
    """Rows from top to bottom in the order of `groups`."""
    for row, values in enumerate(groups.values()):
        known = [value for value in values if math.isfinite(value)]
        axes.plot(known, [row] * len(known), "o", color=COLOURS[0], alpha=0.55, markersize=4.5)
        if spread := interval(known):
            axes.plot(spread, [row, row], color=COLOURS[1], linewidth=1.6)
        if known:
            axes.plot(mean(known), row, "|", color=COLOURS[1], markersize=11, markeredgewidth=2)
    axes.set(xlabel=xlabel, ylim=(len(groups) - 0.4, -0.6))
    axes.set_yticks(range(len(groups)), list(groups))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.4, alpha=0.4)


def spread_out(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Moves heights in [0, 1] apart until neighbours are `gap` apart, each as little as it can."""
    order = sorted(heights, key=lambda name: heights[name])
    clusters: list[list[str]] = []
    for name in order:
        clusters.append([name])
        while len(clusters) > 1 and overlapping(clusters[-2], clusters[-1], heights, gap):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return {
        name: start + gap * place
        for cluster in clusters
        for start in [lowest(cluster, heights, gap)]
        for place, name in enumerate(cluster)
    }


def overlapping(
    below: Sequence[str], above: Sequence[str], heights: Mapping[str, float], gap: float
) -> bool:
    return lowest(below, heights, gap) + gap * len(below) > lowest(above, heights, gap)


def lowest(cluster: Sequence[str], heights: Mapping[str, float], gap: float) -> float:
    """Where a cluster of evenly spaced labels begins when it is centred on its lines."""
    size = gap * (len(cluster) - 1)
    centre = sum(heights[name] for name in cluster) / len(cluster)
    return max(0.0, min(centre - size / 2, 1.0 - size))


def wide_range(values: Sequence[float]) -> bool:
    """Whether positive values span more than two decades, so that a log axis shows more."""
    known = [value for value in values if math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) > 100 * min(known)


def blank(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the one width, and its axes from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, squeeze=False)[:, 0])


def svg(figure: Figure) -> str:
    """The figure as an <svg> element: no date, no metadata, ids that follow from its content."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :]


STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "afferent",
    "text.parse_math": False,  # names may hold dollar signs
    "font.family": ["sans-serif"],
    "font.size": 9,
    "lines.linewidth": 1.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-4, 6),
    "xtick.color": INK,
    "ytick.color": INK,
}
