"""Learning rates as they were configured: read from the groups, and configured anew under any scheduler.

The rate that a group was configured with is not always its ``lr``: a scheduler starts from ``initial_lr``, and
OneCycleLR and CyclicLR are configured by their highest rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, ReduceLROnPlateau, SequentialLR

__all__ = ["configured_rates", "reconfigure_rates", "set_rates", "unknown_schedulers"]


def configured_rates(optimizer: Optimizer, schedulers: Iterable[Any]) -> list[float]:
    """The rate that each group was configured with: its highest under OneCycleLR and CyclicLR.

    Args:
        optimizer: The optimizer.
        schedulers: Its schedulers.
    """
    rates = [float(group.get("max_lr", group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups]
    for scheduler in _leaves(schedulers):
        if isinstance(scheduler, CyclicLR):
            rates = [float(rate) for rate in scheduler.max_lrs]
    return rates


def set_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """Set the rate of each group now."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        _set(group, "lr", rate)


def reconfigure_rates(optimizer: Optimizer, schedulers: Sequence[Any], rates: Sequence[float]) -> None:
    """Bring an optimizer and its schedulers, before the first step, to where they would be with these rates.

    Rates that are given to a scheduler apart (``eta_min``, ``min_lr`` of ReduceLROnPlateau) stay.

    Args:
        optimizer: The optimizer.
        schedulers: Its schedulers, in the order in which they were made.
        rates: What each group is to be configured with, in the sense of :func:`configured_rates`.
    """
    before = configured_rates(optimizer, schedulers)
    ratios = [new / old if old else 1.0 for new, old in zip(rates, before, strict=True)]
    begun = [item for item in _leaves(schedulers) if isinstance(item, LRScheduler) and item.last_epoch > 0]
    for group, old, new, ratio in zip(optimizer.param_groups, before, rates, ratios, strict=True):
        now = float(group["lr"])
        if "max_lr" in group:  # of OneCycleLR
            initial, least = float(group["initial_lr"]), float(group["min_lr"])
            _set(group, "max_lr", new)
            _set(group, "initial_lr", new / _quotient(old, initial))
            _set(group, "min_lr", float(group["initial_lr"]) / _quotient(initial, least))
        elif "initial_lr" in group:
            first = float(group["initial_lr"])
            _set(group, "initial_lr", new if first == old else first * ratio)
        start = float(group["initial_lr"]) if "initial_lr" in group else new
        _set(group, "lr", now * ratio if begun else start)
    if "lr" in optimizer.defaults and ratios:
        optimizer.defaults["lr"] = float(optimizer.defaults["lr"]) * ratios[0]
    for scheduler in _leaves(schedulers):
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        if isinstance(scheduler, CyclicLR):
            scheduler.max_lrs = list(rates)
    for scheduler in schedulers:
        _begin_again(optimizer, scheduler, moved=bool(begun))


def unknown_schedulers(schedulers: Iterable[Any]) -> list[str]:
    """The classes of schedulers that keep rates in ways that are not known."""
    known = (LRScheduler, ReduceLROnPlateau)
    return [type(item).__name__ for item in _leaves(schedulers) if not isinstance(item, known)]


def _leaves(schedulers: Iterable[Any]) -> Iterator[Any]:
    for scheduler in schedulers:
        if nested := getattr(scheduler, "_schedulers", None):
            yield from _leaves(nested)
        else:
            yield scheduler


def _begin_again(optimizer: Optimizer, scheduler: Any, *, moved: bool) -> None:
    """Make a scheduler's first step again, as when it was made."""
    nested = getattr(scheduler, "_schedulers", None)
    if moved or isinstance(scheduler, ReduceLROnPlateau):
        pass
    elif isinstance(scheduler, SequentialLR):  # it begins with the rate of the groups, whatever was made before it
        for group in optimizer.param_groups:
            _set(group, "lr", float(group["initial_lr"]))
        running = next((item for item in nested or () if getattr(item, "last_epoch", -1) == 0), None)
        if running is not None:
            _begin_again(optimizer, running, moved=False)
    elif nested:  # ChainedScheduler
        for item in nested:
            _begin_again(optimizer, item, moved=False)
    elif isinstance(scheduler, LRScheduler):
        scheduler.last_epoch = -1
        scheduler._initial_step()
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [float(group["lr"]) for group in optimizer.param_groups]


def _set(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)  # it stays the tensor that a compiled or captured step reads
    else:
        group[key] = value


def _quotient(a: float, b: float) -> float:
    """A / b as a user would have written it, where that gives b exactly."""
    quotient = a / b
    written = float(f"{quotient:.10g}")
    return written if a / written == b else quotient
