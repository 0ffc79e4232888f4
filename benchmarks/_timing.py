"""Interleaved medians: what the benchmarks share."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import lightning
import torch

from lightning_accel.report.statistics import Estimate

__all__ = ["Timing", "compare", "cpu_seconds", "environment", "interleaved", "show", "shuffled", "table"]

torch.set_num_threads(1)


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one side.

    Attributes:
        median: The median over all rounds.
        ratio: The median over the rounds of this side's time divided by the first side's in the same round.
        low: The lower end of the ratio's 95% interval (bootstrap over rounds).
        high: Its upper end.
    """

    median: float
    ratio: float
    low: float
    high: float


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time functions in turn, in a new random order each round, so that the machine's noise falls on all alike.

    Args:
        functions: What to time; the first one is what the others are compared with.
        rounds: How often each is called.
        warmup: How often each is called first without counting.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number, order in enumerate(shuffled(list(functions), warmup + rounds), -warmup):
        for name in order:
            began = time.perf_counter()
            functions[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return compare(seconds)


def cpu_seconds(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """CPU seconds of each call, in a new random order each round; other processes do not count.

    Args:
        functions: As of :func:`interleaved`; each runs on one thread.
        rounds: How often each is called.
        warmup: How often each is called first without counting.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number, order in enumerate(shuffled(list(functions), warmup + rounds), -warmup):
        for name in order:
            began = time.thread_time()
            functions[name]()
            if number >= 0:
                seconds[name].append(time.thread_time() - began)
    return seconds


def shuffled(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The names in another order each round, the same in every process."""
    order, shuffler = list(names), random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        yield order


def compare(seconds: Mapping[str, list[float]]) -> dict[str, Timing]:
    """Medians of times that were taken in rounds, and their ratios to the first side's.

    Args:
        seconds: Of each side, one time a round.
    """
    first = next(iter(seconds.values()))
    timings, sampler = {}, random.Random(0)
    for name, times in seconds.items():
        ratios = [time / base for time, base in zip(times, first, strict=True)]
        draws = sorted(statistics.median(sampler.choices(ratios, k=len(ratios))) for _ in range(500))
        timings[name] = Timing(statistics.median(times), statistics.median(ratios), draws[12], draws[487])
    return timings


def environment() -> str:
    """The line that says what a benchmark was run on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread; Python {platform.python_version()}, "
        f"torch {torch.__version__}, lightning {lightning.__version__}"
    )


def table(title: str, timings: Mapping[str, Timing], unit: float = 1e-3, unit_name: str = "ms") -> str:
    """A Markdown table of timings."""
    lines = [f"| {title} | {unit_name} | ratio | 95% interval |", "| --- | ---: | ---: | ---: |"]
    for name, timing in timings.items():
        lines.append(
            f"| {name} | {timing.median / unit:.3f} | {timing.ratio:.3f} | {timing.low:.3f} to {timing.high:.3f} |"
        )
    return "\n".join(lines)


def show(estimate: Estimate | None, sign: str = "", digits: int = 2) -> str:
    """An estimate with its interval, where it has one."""
    if estimate is None or estimate.low is None:
        return "" if estimate is None else f"{estimate.value:{sign}.{digits}f}"
    value, low, high = (f"{number:{sign}.{digits}f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"
