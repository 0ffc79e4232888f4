"""Means, ratios and their 95% intervals over few seeds, with no dependency.

Runs come in pairs: both sides are run with the same seed, so they share the initial weights and the order of the data,
and a ratio is taken pair by pair. A ratio's interval is Student's t-interval of the mean of the log ratios, so that
"twice" and "half" are equally far from "no effect".

Paper: Kalibera and Jones, "Rigorous benchmarking in reasonable time", 2013.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Direction", "Estimate", "Verdict", "compute_verdict", "difference", "mean", "ratio", "t_quantile"]

Direction = Literal["lower", "higher"]
Verdict = Literal["better", "worse", "no effect", "not enough seeds", "not reached", ""]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval.

    Attributes:
        value: The mean (the geometric mean for a ratio).
        low: Lower end of the interval; None with fewer than two observations.
        high: Upper end of the interval; None with fewer than two observations.
        count: Number of observations (for a ratio or a difference, of pairs).
    """

    value: float
    low: float | None
    high: float | None
    count: int


def t_quantile(dof: int, confidence: float = 0.95) -> float:
    """Return t such that a Student t variable with ``dof`` degrees of freedom is within [-t, t] with ``confidence``.

    Args:
        dof: Degrees of freedom, at least 1.
        confidence: Probability in (0, 1).

    Paper: closed form of the distribution for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4.
    """

    def inside(t: float) -> float:
        angle = math.atan2(t, math.sqrt(dof))
        cosine, term, total = math.cos(angle), 1.0, 0.0
        if dof % 2 == 0:
            for k in range(dof // 2):
                total += term
                term *= (2 * k + 1) / (2 * k + 2) * cosine**2
            return math.sin(angle) * total
        term = cosine
        for k in range((dof - 1) // 2):
            total += term
            term *= (2 * k + 2) / (2 * k + 3) * cosine**2
        return 2 / math.pi * (angle + math.sin(angle) * total)

    low, high = 0.0, 1.0
    while inside(high) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return (low + high) / 2


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean of ``values`` (at least one) with its 95% t-interval."""
    count = len(values)
    center = math.fsum(values) / count
    if count < 2:
        return Estimate(center, None, None, count)
    if min(values) == max(values):
        return Estimate(values[0], values[0], values[0], count)  # no rounding error where every run agrees
    spread = math.sqrt(math.fsum((value - center) ** 2 for value in values) / (count - 1))
    half = t_quantile(count - 1) * spread / math.sqrt(count)
    return Estimate(center, center - half, center + half, count)


def ratio(base: Sequence[float], other: Sequence[float]) -> Estimate | None:
    """Return the mean ratio of ``other`` to ``base``, pair by pair, with its 95% interval.

    Returns:
        None where there is no pair, or where a value is not positive and finite (a ratio says nothing then).
    """
    if not base or not all(0 < value < math.inf for value in (*base, *other)):
        return None
    logs = mean([math.log(b / a) for a, b in zip(base, other, strict=True)])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Estimate(math.exp(logs.value), low, high, logs.count)


def difference(base: Sequence[float], other: Sequence[float]) -> Estimate | None:
    """Return the mean of ``other`` minus ``base``, pair by pair, with its 95% interval; None where there is no pair."""
    if not base or not all(math.isfinite(value) for value in (*base, *other)):
        return None
    return mean([b - a for a, b in zip(base, other, strict=True)])


def compute_verdict(change: Estimate | None, neutral: float, better: Direction | None, margin: float = 0.0) -> Verdict:
    """Put a change into words.

    Args:
        change: A ratio or a difference with its interval.
        neutral: What "no change" is: 1 for a ratio, 0 for a difference.
        better: Which direction is the better one; None where neither is, then there is no word.
        margin: A change is called one only where the whole interval is further than this from ``neutral``.

    Returns:
        "better" or "worse" where the interval excludes ``neutral``, "no effect" where it does not, and
        "not enough seeds" where there is no interval.
    """
    if change is None or better is None:
        return ""
    if change.low is None or change.high is None:
        return "not enough seeds"
    if change.low <= neutral + margin and change.high >= neutral - margin:
        return "no effect"
    return "better" if (change.high < neutral) == (better == "lower") else "worse"
