"""What one run leaves behind: a small, versioned record that goes to JSON and comes back equal."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

from lightning_accel.report.statistics import Direction

__all__ = ["ACCELERATED", "PLAIN", "SIDES", "Point", "Run", "Side", "Status", "guess_direction"]

Side = Literal["plain", "accelerated"]
Status = Literal["finished", "failed", "interrupted"]
PLAIN: Side = "plain"
ACCELERATED: Side = "accelerated"
SIDES: tuple[Side, Side] = (PLAIN, ACCELERATED)

_FALLING = ("loss", "err", "mae", "mse", "rmse", "nll", "ppl", "perplexity", "wer", "cer", "fid", "distance")


class Point(NamedTuple):
    """One value of a metric.

    Attributes:
        seconds: Seconds since ``trainer.fit`` was called.
        step: Optimizer steps done.
        epoch: Epochs done before this one.
        value: The metric.
    """

    seconds: float
    step: int
    epoch: int
    value: float


@dataclass(frozen=True)
class Run:
    """One run of one side with one seed.

    Attributes:
        side: "plain" or "accelerated".
        seed: What ``seed_everything`` was.
        status: "finished", "failed" or "interrupted"; the numbers below are there for a finished run only.
        seconds_process: Wall-clock seconds of the whole process, imports included.
        seconds_fit: Wall-clock seconds of ``trainer.fit``.
        steps: Optimizer steps done.
        history: The points of each metric, in order of time.
        metrics: The last value of each metric.
        monitored: Names of the metrics that the validation loop logged, in the order in which they were logged.
        peak_memory_bytes: Highest memory in use during the fit, above what was in use when it began.
        memory_kind: What ``peak_memory_bytes`` counts: "resident" memory of the process, or "cuda" allocations.
        optimizer_state_bytes: Bytes of all tensors in the optimizers' state, shared ones counted once.
        parameters: Number of parameters, shared ones counted once.
        nonzeros: Number of parameters that are not zero.
        model_bytes: Bytes of the module's saved ``state_dict``.
        model_bytes_compressed: The same after zlib, where zeroed weights cost next to nothing.
        environment: Versions, hardware and settings the run was made with.
        data: What the data module says of itself (its ``str``).
        sources: Digest of each source file of the user's that took part, by path.
        error: The end of the run's log, for a failed run.
    """

    side: Side
    seed: int
    status: Status
    seconds_process: float = math.nan
    seconds_fit: float = math.nan
    steps: int = 0
    history: dict[str, list[Point]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    monitored: list[str] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    memory_kind: str = ""
    optimizer_state_bytes: int = 0
    parameters: int = 0
    nonzeros: int = 0
    model_bytes: int = 0
    model_bytes_compressed: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    data: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def name(self) -> str:
        """A short name that is unique within a comparison, such as "plain-seed0"."""
        return f"{self.side}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict; values that are not finite become None."""
        data = asdict(self)
        data["history"] = {
            key: [[_to_json(number) for number in point] for point in points] for key, points in self.history.items()
        }
        data["metrics"] = {key: _to_json(value) for key, value in self.metrics.items()}
        return {key: _to_json(value) for key, value in data.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        """Return the run that :meth:`to_dict` described.

        Raises:
            ValueError: If ``data`` is not such a description.
        """
        try:
            known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
            for key in ("seconds_process", "seconds_fit"):
                known[key] = _from_json(known.get(key))
            known["metrics"] = {key: _from_json(value) for key, value in known.get("metrics", {}).items()}
            known["history"] = {
                key: [Point(_from_json(point[0]), point[1], point[2], _from_json(point[3])) for point in points]
                for key, points in known.get("history", {}).items()
            }
            return cls(**known)
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"Expected the record of a run, but got something else ({error}).") from None

    def best(self, metric: str, better: Direction) -> float | None:
        """Return the best value that ``metric`` ever had in this run, or None if it was never logged as a number."""
        values = [point.value for point in self.history.get(metric, []) if not math.isnan(point.value)]
        if not values:
            return None
        return min(values) if better == "lower" else max(values)

    def seconds_to(self, metric: str, target: float, better: Direction) -> float | None:
        """Return the seconds until ``metric`` first was at least as good as ``target``; None if it never was."""
        for point in self.history.get(metric, []):
            if point.value <= target if better == "lower" else point.value >= target:
                return point.seconds
        return None


def guess_direction(metric: str) -> Direction:
    """Return "lower" for a metric whose name speaks of a loss or an error, else "higher"."""
    words = metric.lower().replace("/", "_").replace("-", "_").replace(".", "_").split("_")
    return "lower" if any(word.startswith(_FALLING) or word.endswith("loss") for word in words) else "higher"


def _to_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> float:
    return math.nan if value is None else float(value)
