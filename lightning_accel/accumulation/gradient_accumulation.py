"""Gradient accumulation: several micro-batches make one optimizer step, so that a batch need not fit in memory.

The gradient of a window of micro-batches of equal size is exactly that of one big batch, also in the short last window
of an epoch, which Lightning divides by the full factor; and the factor may change at any point of the fit, as in "Don't
Decay the Learning Rate, Increase the Batch Size" (Smith et al. 2018, https://arxiv.org/abs/1711.00489).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_accel.errors import check_int
from lightning_accel.hooks import AccumulationWindow, Contract, Moment
from lightning_accel.schedules import Duration

__all__ = ["GradientAccumulation", "factor_at", "parse_factors"]


def parse_factors(factor: int | Mapping[int | str, int]) -> list[tuple[Duration, int]]:
    """Read a factor, or a schedule of factors, as a list of (from when, factor), in the order written.

    Raises:
        TypeError: If it is neither an int nor a mapping, or a factor in it is no int.
        ValueError: If a factor is below 1, the schedule is empty, or a key is not a duration.
    """
    if not isinstance(factor, Mapping):
        return [(Duration(0, "epoch"), check_int("factor", factor, minimum=1))]
    if not factor:
        raise ValueError("Expected `factor` to have at least one entry, but got {}.")
    return [
        (Duration.parse("factor", start, default_unit="epoch"), check_int(f"factor[{start!r}]", value, minimum=1))
        for start, value in factor.items()
    ]


def factor_at(factors: list[tuple[Duration, int]], now: Moment) -> int:
    """The factor at a moment: that of the last entry reached, or 1 before all of them.

    Raises:
        ValueError: If an entry is a fraction of the fit and the fit has no end.
    """
    return next((value for start, value in reversed(factors) if start.reached(now)), 1)


class GradientAccumulation(AccumulationWindow):
    """Make one optimizer step of ``factor`` training batches.

    Args:
        factor: How many batches make a step; or a schedule from a duration to a factor, such as
            ``{0: 1, "0.5fit": 4}``. A plain int as a key counts epochs. Of the entries that are reached the last one
            written holds; before the first one the factor is 1. A change takes effect at the next window.

    Raises:
        TypeError: If ``factor`` is neither an int nor a mapping of durations to ints.
        ValueError: If a factor is below 1 or a key is not a duration.

    Example:
        >>> GradientAccumulation(factor=4).next_factor(Moment(step=0, batch=0, epoch=0.0, fit=0.0))
        4
        >>> GradientAccumulation({0: 1, "0.5fit": 4}).next_factor(Moment(step=9, batch=9, epoch=1.5, fit=0.75))
        4
    """

    contract = Contract(
        purpose="Make one optimizer step of several batches, by a factor that may change during the fit.",
        touches=frozenset({"accumulation window"}),
        acts="at the start of each window of batches",
        expects="larger effective batches in the same memory",
        docs="methods/gradient_accumulation",
        once=True,
        manual_optimization="there the module itself decides when to step. Accumulate in `training_step`, or set "
        "`automatic_optimization = True`.",
        refuses={
            "GradientAccumulationScheduler": "both set how many batches make an optimizer step. Remove the scheduler.",
            "DeepSpeedStrategy": "DeepSpeed's engine counts windows by itself, with one factor for the whole fit. Use "
            "ZeROStrategy (accel_zero1, accel_zero2, accel_zero3), which leaves them to the Trainer.",
        },
        accepts=frozenset({"ZeROStrategy"}),
    )

    def __init__(self, factor: int | dict[int | str, int] = 1) -> None:
        super().__init__(factor=factor)
        self._factors = parse_factors(factor)

    @property
    def is_neutral(self) -> bool:
        """Whether every factor is 1."""
        return all(value == 1 for _, value in self._factors)

    def next_factor(self, now: Moment) -> int:
        """The factor of a window that starts at ``now``."""
        return factor_at(self._factors, now)

    def count_steps(self, batches: int, epochs: int, max_steps: int = -1) -> int:
        """The optimizer steps of a whole fit; at once for a factor that never changes."""
        (start, factor), *changes = self._factors
        if changes or start.value > 0:
            return super().count_steps(batches, epochs, max_steps)
        steps = math.ceil(batches / factor) * epochs
        return steps if max_steps == -1 else min(steps, max_steps)
