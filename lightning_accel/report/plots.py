"""Plots of a receipt as SVG text, drawn by matplotlib: crisp at any size, and small enough to be part of the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_accel.report.record import Side
from lightning_accel.report.statistics import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bar", "Line", "change_plot", "line_plot"]

COLORS: dict[Side, str] = {"plain": "#3a6ea5", "accelerated": "#d9730d"}
"""The colour of each side."""
_VERDICT_COLORS = {"better": "#12804a", "worse": "#c0352b", "not reached": "#9a6b00", "not enough seeds": "#9a6b00"}
_SOFT, _GRID = "#667085", "#e3e7ed"


@dataclass(frozen=True)
class Line:
    """One run's curve: whose it is, its name, and its points (x, y), all of them finite."""

    side: Side
    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One quantity's ratio with its interval, and the word for it."""

    label: str
    value: float
    low: float
    high: float
    text: str
    verdict: Verdict


def line_plot(lines: Sequence[Line], x_label: str, y_label: str, target: float | None = None) -> str:
    """Return a plot of every run's curve, with a dashed line at ``target``; empty text where there is no point."""
    if not any(line.points for line in lines):
        return ""
    figure, axes = _axes(6.4, 3.6)
    for line in lines:
        (drawn,) = axes.plot(*zip(*line.points, strict=True), color=COLORS[line.side], lw=1.4, marker="o", ms=3.5)
        drawn.set_gid(line.name)
    if target is not None:
        axes.axhline(target, color=_SOFT, ls="--", lw=1, gid="target")
        axes.annotate(f"target {target:.4g}", (0.01, target), xycoords=("axes fraction", "data"), va="bottom")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]) if axes.get_xlim()[0] < 0 else 0.0)
    axes.grid(axis="y", color=_GRID)
    return _svg(figure, f"{y_label} against {x_label}")


def change_plot(bars: Sequence[Bar]) -> str:
    """Return the ratios of all quantities with their intervals, on a log axis around 1; empty text for no bars."""
    if not bars:
        return ""
    figure, axes = _axes(6.9, 0.8 + 0.28 * len(bars))
    # An interval from two or three noisy seeds can span decades; what falls outside the axis is cut off.
    shown = [end for bar in bars for end in (bar.value, max(bar.low, bar.value / 4), min(bar.high, bar.value * 4))]
    low, high = min(0.8, *shown) / 1.07, max(1.25, *shown) * 1.07
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.axvline(1, color="black", lw=1)
    for place, bar in enumerate(bars):
        color = _VERDICT_COLORS.get(bar.verdict, _SOFT)
        ends = [max(bar.low, low), min(bar.high, high)]
        axes.plot(ends, [place, place], color=color, lw=2, marker="|", ms=8, gid=f"interval {bar.label}")
        axes.plot([bar.value], [place], color=color, marker="o", ms=6, gid=f"ratio {bar.label}")
        axes.annotate(
            bar.verdict, (1.02, place), xycoords=("axes fraction", "data"), va="center", annotation_clip=False
        )
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:.3g}x")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel("accelerated / plain")
    axes.grid(axis="x", color=_GRID)
    return _svg(figure, "Accelerated against plain, quantity by quantity")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    import matplotlib

    text = io.StringIO()
    # text stays text: small, and found by a search
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "receipt"}):
        figure.savefig(text, format="svg", metadata={"Title": title, "Date": None})
    return text.getvalue()
