"""The receipt: what a method gained and what it lost, from runs of both sides, in one data structure.

Everything that is shown or written (the terminal, Markdown, JSON, the HTML page) is drawn from :class:`Receipt`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal

from lightning_accel.report.record import ACCELERATED, PLAIN, SIDES, Run, Side, guess_direction
from lightning_accel.report.statistics import (
    Direction,
    Estimate,
    Verdict,
    compute_verdict,
    difference,
    mean,
    ratio,
)

__all__ = ["Receipt", "Row", "choose_metric", "make_receipt"]

VERSION = 1
MARGIN = 0.005  # a change of time or size below half a percent is not called a change
Unit = Literal["seconds", "bytes", "count", "metric"]
_BySide = dict[Side, dict[int, Run]]
_Value = Callable[[Run], "float | int | None"]
_TIMES: tuple[tuple[str, str, Unit], ...] = (
    ("seconds_fit", "Time to finish the fit", "seconds"),
    ("seconds_process", "Time of the whole process", "seconds"),
)
_SIZES: tuple[tuple[str, str, Unit], ...] = (
    ("peak_memory_bytes", "Peak memory of the fit", "bytes"),
    ("optimizer_state_bytes", "Optimizer state", "bytes"),
    ("parameters", "Parameters", "count"),
    ("nonzeros", "Parameters that are not 0", "count"),
    ("model_bytes", "Saved model", "bytes"),
    ("model_bytes_compressed", "Saved model, zipped", "bytes"),
)


@dataclass(frozen=True)
class Row:
    """One quantity, both sides, and how it changed.

    Attributes:
        key: Stable name of the quantity.
        label: What people read.
        unit: How to print the numbers.
        better: Which direction is better; None where neither is.
        plain: Mean and 95% interval over the plain runs; None where there is no number.
        accelerated: The same for the accelerated runs.
        change: Accelerated against plain, seed by seed; None where it can't be told.
        kind: Whether ``change`` is a "ratio" (1 is no change) or, where not all numbers are positive, a "difference".
        verdict: "better", "worse", "no effect", "not enough seeds", "not reached", or empty.
        note: What a reader must know to trust the row.
    """

    key: str
    label: str
    unit: Unit
    better: Direction | None
    plain: Estimate | None
    accelerated: Estimate | None
    change: Estimate | None
    kind: Literal["ratio", "difference"] = "ratio"
    verdict: Verdict = ""
    note: str = ""


@dataclass(frozen=True)
class Receipt:
    """A comparison of a plain and an accelerated run over several seeds.

    Attributes:
        command: What to type to repeat it.
        created: UTC time in ISO format.
        sides: What each side is, in a few words.
        configs: The text of each configuration file that took part, by file name.
        metric: The metric that was compared; empty where nothing was logged.
        better: Which direction of the metric is better.
        target: The value whose reaching is timed; None where there is no metric.
        target_note: Where the target comes from.
        runs: Every run, the failed ones too.
        rows: The statistics.
        notes: Sentences for the reader: what was cut short, what is not comparable.
        version: Of this format.
    """

    command: str
    created: str
    sides: dict[str, str]
    configs: dict[str, str]
    metric: str
    better: Direction
    target: float | None
    target_note: str
    runs: list[Run]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    version: int = VERSION

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the first finished run."""
        return next((run.environment for run in self.runs if run.status == "finished"), {})

    @property
    def data(self) -> str:
        """What the data modules of the finished runs say of themselves."""
        return "; ".join(dict.fromkeys(run.data for run in self.runs if run.data))

    def finished(self, side: Side) -> list[Run]:
        """The finished runs of one side, by seed."""
        chosen = [run for run in self.runs if run.side == side and run.status == "finished"]
        return sorted(chosen, key=lambda run: run.seed)

    def to_json(self) -> str:
        """Return the receipt as JSON text (standard JSON: numbers that are not finite are null)."""
        data = {**asdict(self), "runs": [run.to_dict() for run in self.runs]}
        return json.dumps({"format": "lightning-accel receipt", **data}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """Return the receipt that :meth:`to_json` wrote.

        Raises:
            ValueError: If ``text`` is not a receipt, or one of another version.
        """
        data: Any = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != "lightning-accel receipt":
            raise ValueError("Expected the JSON of a lightning-accel receipt, but got something else.")
        if data.get("version") != VERSION:
            raise ValueError(f"Expected a receipt of version {VERSION}, but got version {data.get('version')!r}.")

        def estimate(value: dict[str, Any] | None) -> Estimate | None:
            return None if value is None else Estimate(**value)

        estimates = ("plain", "accelerated", "change")
        rows = [Row(**{**row, **{key: estimate(row[key]) for key in estimates}}) for row in data["rows"]]
        return cls(**{**data, "rows": rows, "runs": [Run.from_dict(run) for run in data["runs"]]})


def choose_metric(runs: Sequence[Run]) -> str:
    """Return the metric to compare when none was asked for.

    That is a validation metric that every run logged, one that rises (an accuracy) before one that falls (a loss);
    without a validation loop any logged metric; and the empty string where nothing was logged.
    """
    if not runs:
        return ""
    shared = [name for name in runs[0].metrics if all(name in run.metrics for run in runs)]
    validated = [name for name in runs[0].monitored if name in shared]
    return min(validated or shared, key=lambda name: guess_direction(name) == "lower", default="")


def make_receipt(
    runs: Sequence[Run],
    *,
    metric: str = "",
    better: Direction | None = None,
    target: float | None = None,
    command: str = "",
    created: str = "",
    sides: dict[str, str] | None = None,
    configs: dict[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Receipt:
    """Compute the statistics of ``runs``.

    Args:
        runs: Runs of both sides. Ratios are taken over the seeds that finished on both.
        metric: The metric to compare; chosen by :func:`choose_metric` when empty.
        better: Its better direction; guessed from its name by default.
        target: The value whose reaching is timed; by default the best value that the weaker side reaches on average.
        command: Kept for the reader, as are ``created``, ``sides`` and ``configs``.
        created: See ``command``.
        sides: See ``command``.
        configs: See ``command``.
        notes: Sentences to put before those found here.
    """
    finished = [run for run in runs if run.status == "finished"]
    metric = metric or choose_metric(finished)
    better = better or guess_direction(metric)
    by_side = {side: {run.seed: run for run in finished if run.side == side} for side in SIDES}
    target_note = "given"
    if target is None:
        target, target_note = _default_target(by_side, metric, better), "the best value of the weaker side, on average"

    rows = [_row(by_side, key, label, unit, "lower", attrgetter(key)) for key, label, unit in _TIMES]
    if metric and target is not None:
        rows.append(_target_row(by_side, metric, target, better))
    others = [name for name in (finished[0].monitored if finished else []) if name != metric]
    for name in [metric, *others[:7]] if metric else []:
        direction = better if name == metric else guess_direction(name)
        rows.append(_row(by_side, f"metric:{name}", f"Final {name}", "metric", direction, _last(name)))
    rows += [_row(by_side, key, label, unit, "lower", attrgetter(key)) for key, label, unit in _SIZES]
    return Receipt(
        command=command,
        created=created,
        sides=sides or {PLAIN: "", ACCELERATED: ""},
        configs=configs or {},
        metric=metric,
        better=better,
        target=target,
        target_note=target_note if target is not None else "",
        runs=list(runs),
        rows=rows,
        notes=[*notes, *_notes(runs, by_side, metric)],
    )


def _last(metric: str) -> _Value:
    return lambda run: run.metrics.get(metric)


def _row(by_side: _BySide, key: str, label: str, unit: Unit, better: Direction, value: _Value) -> Row:
    """Return the row of one quantity; runs that lack it take no part."""
    numbers: dict[Side, dict[int, float]] = {side: {} for side in SIDES}
    for side, runs in by_side.items():
        for seed, run in runs.items():
            number = value(run)
            if number is not None and math.isfinite(number):
                numbers[side][seed] = float(number)
    plain, accelerated = (mean(list(numbers[side].values())) if numbers[side] else None for side in SIDES)
    seeds = sorted(numbers[PLAIN].keys() & numbers[ACCELERATED].keys())
    pairs = [[numbers[side][seed] for seed in seeds] for side in SIDES]
    row = Row(key, label, unit, better, plain, accelerated, ratio(*pairs))
    if row.change is not None:
        inner = 0.0 if unit == "metric" else MARGIN
        return replace(row, verdict=compute_verdict(row.change, 1.0, better, inner))
    change = difference(*pairs)
    return replace(row, change=change, kind="difference", verdict=compute_verdict(change, 0.0, better))


def _target_row(by_side: _BySide, metric: str, target: float, better: Direction) -> Row:
    """Return the row of the time to the target.

    A run that never got there is counted at its whole time, which is too short. That can only understate the other
    side's gain: "better" stays sound when only plain runs are missing, and "worse" when only accelerated ones are.
    """

    def seconds(run: Run) -> float:
        reached = run.seconds_to(metric, target, better)
        return run.seconds_fit if reached is None else reached

    row = _row(by_side, "seconds_to_target", f"Time to {metric} {target:.4g}", "seconds", "lower", seconds)
    missing = {side: _count_missing(by_side[side], metric, target, better) for side in SIDES}
    if not any(missing.values()):
        return row
    sound = {(True, False): "better", (False, True): "worse"}.get((missing[PLAIN] > 0, missing[ACCELERATED] > 0))
    counts = [f"{missing[side]} of {len(by_side[side])} {side} runs never got there" for side in SIDES if missing[side]]
    note = " and ".join(counts) + "; they are counted at their whole time, which is too short"
    verdict = row.verdict if row.verdict in (sound, "not enough seeds") else "not reached"
    return replace(row, verdict=verdict, note=note)


def _count_missing(runs: dict[int, Run], metric: str, target: float, better: Direction) -> int:
    return sum(run.seconds_to(metric, target, better) is None for run in runs.values())


def _default_target(by_side: _BySide, metric: str, better: Direction) -> float | None:
    means = []
    for runs in by_side.values():
        best = [value for run in runs.values() if (value := run.best(metric, better)) is not None]
        if best:
            means.append(mean(best).value)
    if not means:
        return None
    return max(means) if better == "lower" else min(means)


def _notes(runs: Sequence[Run], by_side: _BySide, metric: str) -> list[str]:
    notes = []
    finished = [run for run in runs if run.status == "finished"]
    if failed := [run.name for run in runs if run.status == "failed"]:
        notes.append(f"Failed and left out: {', '.join(failed)}.")
    unpaired = sorted(by_side[PLAIN].keys() ^ by_side[ACCELERATED].keys())
    if unpaired:
        seeds = ", ".join(map(str, unpaired))
        notes.append(f"Finished on one side only, so in the means but not in the ratios: seed {seeds}.")
    if finished and not metric:
        notes.append("The runs logged no metric, so only time, memory and size are compared: log one with self.log.")
    elif finished and not any(metric in run.monitored for run in finished):
        notes.append(
            f"{metric} was not logged by a validation loop. A method that changes the training batch or the loss "
            "changes a training metric by itself: add a validation loop for a fair comparison."
        )
    if len({json.dumps(run.environment, sort_keys=True) for run in finished}) > 1:
        notes.append("The runs were made in different environments, so times and memory may not be comparable.")
    digests: dict[str, set[str]] = {}
    for run in finished:
        for path, digest in run.sources.items():
            digests.setdefault(path, set()).add(digest)
    if changed := sorted(path for path, seen in digests.items() if len(seen) > 1):
        notes.append(f"The code changed while the runs were made, so they are not comparable: {', '.join(changed)}.")
    if any(run.memory_kind == "resident" for run in finished):
        notes.append(
            "Peak memory is the resident memory of the process above what it held when the fit began; data-loading "
            "workers are not counted."
        )
    return notes
