"""Plots of a receipt as SVG text: crisp at any size, a few kilobytes each, and part of the page itself.

Colours come from the page's style sheet (classes ``plain`` and ``accelerated``), so that a dark page gets a dark plot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lightning_accel.report.record import Side
from lightning_accel.report.statistics import Verdict

__all__ = ["Bar", "Line", "change_plot", "line_plot", "ticks"]

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 74, 14, 14, 48


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


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power: float = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_plot(lines: Sequence[Line], x_label: str, y_label: str, target: float | None = None) -> str:
    """Return a plot of every run's curve, with a dashed line at ``target``; empty text where there is no point."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([] if target is None else [target])
    if not xs:
        return ""
    height = 340
    x_low, x_high = min(0.0, *xs), max(xs) or 1.0
    pad = (max(ys) - min(ys)) * 0.06 or abs(ys[0]) * 0.1 or 1.0
    y_low, y_high = min(ys) - pad, max(ys) + pad

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            height - _BOTTOM - (y - y_low) / (y_high - y_low) * (height - _TOP - _BOTTOM),
        )

    parts = [_open(height, f"{y_label} against {x_label}")]
    for tick in ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick:.4g}", "end"))
    for tick in ticks(x_low, x_high, 6):
        x, _ = place(tick, y_low)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" y1="{height - _BOTTOM}" x2="{x:.1f}" y2="{height - _BOTTOM + 5}"/>'
        )
        parts.append(_text(x, height - _BOTTOM + 20, f"{tick:g}", "middle"))
    base = height - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{_WIDTH - _RIGHT}" y2="{base}"/>')
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 8, x_label, "middle"))
    middle = (_TOP + height - _BOTTOM) / 2
    parts.append(f'<g transform="rotate(-90 14 {middle:.0f})">{_text(14, middle, y_label, "middle")}</g>')
    if target is not None:
        _, y = place(x_low, target)
        parts.append(f'<line class="target" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT + 6, y - 5 if y > _TOP + 16 else y + 16, f"target {target:.4g}", "start"))
    for line in lines:
        placed = [place(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in placed) if len(placed) <= 40 else ""
        title = f"<title>{escape(line.name)}</title>"
        parts.append(f'<g class="{line.side}">{title}<polyline points="{path}"/>{dots}</g>')
    return "".join([*parts, "</svg>"])


def change_plot(bars: Sequence[Bar]) -> str:
    """Return the ratios of all quantities with their intervals, on a log axis around 1; empty text for no bars."""
    if not bars:
        return ""
    left, right, row, bottom = 205, 140, 26, 44
    height = _TOP + row * len(bars) + bottom
    # An interval from two or three noisy seeds can span decades; what falls outside the axis is cut with an arrow.
    shown = [end for bar in bars for end in (bar.value, max(bar.low, bar.value / 4), min(bar.high, bar.value * 4))]
    low, high = math.log2(min(0.8, *shown)) - 0.1, math.log2(max(1.25, *shown)) + 0.1

    def place(value: float) -> float:
        return left + (min(max(math.log2(value), low), high) - low) / (high - low) * (_WIDTH - left - right)

    parts = [_open(height, "Accelerated against plain, quantity by quantity")]
    base = height - bottom
    every = max(1, math.ceil((high - low) / 7))
    candidates = [2.0**k for k in range(math.ceil(low), math.floor(high) + 1) if k % every == 0]
    if high - low < 2:
        candidates = [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2]
    for tick in (tick for tick in candidates if low <= math.log2(tick) <= high):
        x = place(tick)
        kind = "one" if tick == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{base}"/>')
        parts.append(_text(x, base + 18, f"{tick:.3g}x", "middle"))
    parts.append(_text((left + _WIDTH - right) / 2, height - 4, "accelerated / plain", "middle"))
    for index, bar in enumerate(bars):
        y = _TOP + row * (index + 0.5)
        word = bar.verdict.replace(" ", "-") or "none"
        parts.append(_text(left - 10, y + 4, bar.label, "end"))
        parts.append(f'<g class="bar {word}"><title>{escape(bar.label)}: {escape(bar.text)}</title>')
        parts.append(f'<line x1="{place(bar.low):.1f}" y1="{y:.1f}" x2="{place(bar.high):.1f}" y2="{y:.1f}"/>')
        for end, arrow in ((bar.low, -6), (bar.high, 6)):
            x = place(end)
            if low <= math.log2(end) <= high:
                parts.append(f'<line x1="{x:.1f}" y1="{y - 4:.1f}" x2="{x:.1f}" y2="{y + 4:.1f}"/>')
            else:
                parts.append(
                    f'<polyline points="{x - arrow:.1f},{y - 4:.1f} {x:.1f},{y:.1f} {x - arrow:.1f},{y + 4:.1f}"/>'
                )
        parts.append(f'<circle cx="{place(bar.value):.1f}" cy="{y:.1f}" r="4.5"/></g>')
        parts.append(_text(_WIDTH - right + 10, y + 4, bar.verdict, "start"))
    return "".join([*parts, "</svg>"])


def _open(height: float, title: str) -> str:
    name = escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg">'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
