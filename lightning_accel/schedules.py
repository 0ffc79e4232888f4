"""When something happens and how strong it is then: durations, and value schedules over a progress in [0, 1].

A :class:`Duration` is a length of training in the unit that its writer thinks in: ``"500step"`` (optimizer steps),
``"200batch"`` (training batches), ``"10epoch"`` or ``"0.3fit"`` (a fraction of the whole fit, whatever limits it). A
:class:`Moment` is where a fit is, a :class:`FitLength` how long it is in all; :func:`interval_progress` turns them into
a progress in [0, 1], and :func:`value_at` a progress into a value. Everything here is plain Python without state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from lightning_accel.errors import check_choice, check_fraction, check_int, check_number

__all__ = [
    "SCHEDULES",
    "Duration",
    "FitLength",
    "Moment",
    "Unit",
    "constant",
    "cosine",
    "cubic",
    "exponential",
    "interval_progress",
    "linear",
    "one_cycle",
    "polynomial",
    "step",
    "value_at",
]

Unit = Literal["step", "batch", "epoch", "fit"]

_DURATION = re.compile(
    r"(?P<value>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>(?:step|epoch|fit)s?|batch(?:es)?|)"
)
_FORM = "a duration such as '500step', '200batch', '10epoch', '0.3fit' or an int"
# A moment is a quotient (batches over batches an epoch) that may miss a written decimal by one rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Moment:
    """Where a fit is.

    Attributes:
        step: Optimizer steps done.
        batch: Training batches done, over all epochs.
        epoch: Epochs done, with the fraction of the current one where its length is known.
        fit: Fraction of the whole fit that is done, in [0, 1]; ``None`` when the fit has no end.
    """

    step: int
    batch: int
    epoch: float
    fit: float | None


@dataclass(frozen=True)
class FitLength:
    """How long a whole fit is; ``None`` for what isn't known (an endless or timed fit, a loader without a length).

    Attributes:
        steps: Optimizer steps.
        batches: Training batches.
        epochs: Epochs.
    """

    steps: float | None
    batches: float | None
    epochs: float | None


@dataclass(frozen=True)
class Duration:
    """A length of training, in one of four units.

    Attributes:
        value: How many: a whole number of steps or batches, a fraction in [0, 1] of a fit, or epochs (fractions too).
        unit: ``"step"`` (optimizer steps), ``"batch"``, ``"epoch"`` or ``"fit"``.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If ``value`` does not suit the unit, or there is no such unit.

    Example:
        >>> Duration.parse("warmup", "500step")
        Duration(value=500.0, unit='step')
        >>> str(Duration(0.3, "fit"))
        '0.3fit'
    """

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        """Check the value against the unit."""
        check_choice("unit", self.unit, get_args(Unit))
        object.__setattr__(self, "value", _checked("value", self.value, self.unit, self.value))

    @classmethod
    def parse(cls, name: str, value: str | int | Duration, default_unit: Unit = "step") -> Duration:
        """Read a duration that a user gave for the argument ``name``.

        Args:
            name: The argument, for the error's sentence.
            value: Text such as ``"500step"`` (plurals and spaces are fine), an int or a number as text (in
                ``default_unit``), or a duration, which is returned as it is.
            default_unit: The unit of a bare number.

        Raises:
            TypeError: If it is neither text, an int nor a duration.
            ValueError: If the text can't be read, or the number does not suit the unit.
        """
        if isinstance(value, Duration):
            return value
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise TypeError(f"Expected `{name}` to be {_FORM}, but got {value!r}.")
        match = _DURATION.fullmatch(str(value).strip())
        if match is None:
            raise ValueError(f"Expected `{name}` to be {_FORM}, but got {value!r}.")
        text = match["unit"]
        unit: Unit = next((known for known in get_args(Unit) if text.startswith(known)), default_unit)
        return cls(_checked(name, float(match["value"]), unit, value), unit)

    def elapsed(self, moment: Moment) -> float:
        """The position of ``moment`` in this duration's own unit.

        Raises:
            ValueError: If the unit is ``"fit"`` and the fit has no end.
        """
        position = {"step": moment.step, "batch": moment.batch, "epoch": moment.epoch, "fit": moment.fit}[self.unit]
        if position is None:
            raise _endless(self)
        return position

    def reached(self, moment: Moment) -> bool:
        """Whether a fit that is at ``moment`` has lasted this long; raises as :meth:`elapsed` does."""
        return self.elapsed(moment) >= self.value - _ROUNDING

    def fraction(self, length: FitLength) -> float:
        """This duration as a fraction of a whole fit; above 1 if it is longer than the fit.

        Raises:
            ValueError: If the fit's length in this unit isn't known.
        """
        if self.unit == "fit":
            return self.value
        total = {"step": length.steps, "batch": length.batches, "epoch": length.epochs}[self.unit]
        if total is None or math.isinf(total):
            raise _endless(self)
        return self.value / total if total else float(self.value > 0)

    def __str__(self) -> str:
        """The text that :meth:`parse` reads back as this very duration."""
        return f"{int(self.value) if self.value.is_integer() else self.value!r}{self.unit}"


def _checked(name: str, value: Any, unit: Unit, given: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected `{name}` to be a number, but got {given!r}.")
    number = float(value)
    if unit == "fit" and not 0 <= number <= 1:
        raise ValueError(f"Expected `{name}` to be in [0, 1] of the fit, but got {given!r}.")
    if unit == "epoch" and not 0 <= number < math.inf:
        raise ValueError(f"Expected `{name}` to be a number of epochs of at least 0, but got {given!r}.")
    if unit in ("step", "batch") and not (0 <= number < math.inf and number.is_integer()):
        plural = "steps" if unit == "step" else "batches"
        raise ValueError(f"Expected `{name}` to be a whole number of {plural} of at least 0, but got {given!r}.")
    return number


def _endless(duration: Duration) -> ValueError:
    return ValueError(
        f"Expected a fit with a known end to place '{duration}' in it, but this fit has none in that unit: set "
        "`max_steps`, `max_epochs` or `max_time` of the Trainer, or give every duration of this method in one unit out "
        "of steps, batches and epochs."
    )


def interval_progress(moment: Moment, start: Duration, end: Duration, length: FitLength) -> float:
    """How far ``moment`` is between ``start`` and ``end``, in [0, 1].

    It is exactly 0 until ``start`` and exactly 1 from ``end`` on. In between it is linear: in the unit of ``start`` and
    ``end`` if they share one, else in fractions of the fit.

    Raises:
        ValueError: If the units differ, or are ``"fit"``, and the fit's length isn't known.
    """
    if end.reached(moment):
        return 1.0
    if not start.reached(moment):
        return 0.0
    if start.unit == end.unit:
        now, first, last = start.elapsed(moment), start.value, end.value
    else:
        now, first, last = Duration(0, "fit").elapsed(moment), start.fraction(length), end.fraction(length)
    return min(max((now - first) / (last - first), 0.0), 1.0) if last > first else 1.0


def _blend(weight: float, start: float, end: float) -> float:
    """The value ``weight`` of the way from ``start`` to ``end``: exact at both ends, and never outside them."""
    if weight <= 0 or weight >= 1:
        return end if weight >= 1 else start
    return min(max(start + (end - start) * weight, min(start, end)), max(start, end))


def constant(progress: float, start: float, end: float) -> float:
    """``end``, from the first moment on."""
    check_fraction("progress", progress)
    return end


def linear(progress: float, start: float, end: float) -> float:
    """A straight line from ``start`` to ``end``."""
    return _blend(check_fraction("progress", progress), start, end)


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine: flat at both ends, steepest in the middle."""
    return _blend((1 - math.cos(math.pi * check_fraction("progress", progress))) / 2, start, end)


def cubic(progress: float, start: float, end: float) -> float:
    """``end + (start - end) * (1 - progress) ** 3``: fast at first, then slower and slower.

    From "To prune, or not to prune: exploring the efficacy of pruning for model compression" (Zhu and Gupta, 2017).
    """
    left = 1 - check_fraction("progress", progress)
    return _blend(1 - left * left * left, start, end)


def polynomial(progress: float, start: float, end: float, power: float = 2.0) -> float:
    """``end + (start - end) * (1 - progress) ** power``; a ``power`` of 1 is :func:`linear`, of 3 :func:`cubic`."""
    left = 1 - check_fraction("progress", progress)
    power = check_number("power", power, 0, math.inf, open_low=True, open_high=True)
    return _blend(1 - math.pow(left, power), start, end)


def exponential(progress: float, start: float, end: float) -> float:
    """``start * (end / start) ** progress``: the same factor in every equal stretch of time.

    Raises:
        ValueError: If ``start`` and ``end`` are not both above or both below zero.
    """
    check_fraction("progress", progress)
    if not (start > 0 < end or start < 0 > end):
        raise ValueError(
            "Expected `start` and `end` of an exponential schedule to be both above or both below 0, "
            f"but got {start!r} and {end!r}."
        )
    if progress in (0, 1):
        return end if progress else start
    return min(max(start * math.pow(end / start, progress), min(start, end)), max(start, end))


def step(
    progress: float, start: float, end: float, num_steps: int = 4, milestones: Sequence[float] | None = None
) -> float:
    """Equal jumps from ``start`` to ``end``.

    Args:
        progress: Where we are, in [0, 1].
        start: The value before the first jump.
        end: The value after the last jump.
        num_steps: How many jumps, evenly spaced, the last one at progress 1.
        milestones: The progress of each jump, in (0, 1] and increasing; in place of ``num_steps``.
    """
    check_fraction("progress", progress)
    if milestones is None:
        milestones = [jump / num_steps for jump in range(1, check_int("num_steps", num_steps, minimum=1) + 1)]
    increasing = all(low < high for low, high in zip([0, *milestones], milestones, strict=False))
    if not milestones or not increasing or milestones[-1] > 1:
        raise ValueError(f"Expected `milestones` to be increasing numbers in (0, 1], but got {milestones!r}.")
    return _blend(sum(milestone <= progress for milestone in milestones) / len(milestones), start, end)


def one_cycle(progress: float, start: float, end: float, peak: float = 1.0, warm: float = 0.3) -> float:
    """Half a cosine from ``start`` to ``peak``, then half a cosine from ``peak`` to ``end``.

    Args:
        progress: Where we are, in [0, 1].
        start: The value at progress 0.
        end: The value at progress 1.
        peak: The value at progress ``warm``.
        warm: Where the peak is, in [0, 1).
    """
    check_fraction("progress", progress)
    check_number("warm", warm, 0, 1, open_high=True)
    if progress < warm:
        return cosine(progress / warm, start, peak)
    return cosine((progress - warm) / (1 - warm), peak, end)


SCHEDULES: Mapping[str, Callable[..., float]] = MappingProxyType(
    {
        function.__name__: function
        for function in (constant, linear, cosine, cubic, polynomial, exponential, step, one_cycle)
    }
)
"""Every value schedule by its name."""


def value_at(schedule: str, progress: float, start: float, end: float, **options: Any) -> float:
    """The value of a schedule.

    Args:
        schedule: A name in :data:`SCHEDULES`.
        progress: Where we are, in [0, 1].
        start: The value at progress 0.
        end: The value at progress 1.
        options: What else the schedule takes: ``power`` of ``"polynomial"``, ``num_steps`` or ``milestones`` of
            ``"step"``, ``peak`` and ``warm`` of ``"one_cycle"``.

    Raises:
        ValueError: If there is no such schedule, or ``progress`` is outside [0, 1].

    Example:
        >>> value_at("cubic", 0.5, start=0.0, end=0.8)
        0.7000000000000001
    """
    return SCHEDULES[check_choice("schedule", schedule, SCHEDULES)](progress, start, end, **options)
