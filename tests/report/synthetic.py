"""Runs made up for the tests of the report, with numbers that are easy to check by hand."""

from __future__ import annotations

from typing import Any

from lightning_accel.report.record import Point, Run, Side


def make_run(side: Side, seed: int, **changes: Any) -> Run:
    """A finished run with three validations; `changes` replaces fields, `accuracies` the history."""
    accuracies = changes.pop("accuracies", [0.5, 0.8, 0.9])
    seconds = changes.get("seconds_fit", 3.0)
    times = [seconds * (index + 1) / len(accuracies) for index in range(len(accuracies))]
    history = {
        "val_acc": [Point(t, 10 * (i + 1), i, a) for i, (t, a) in enumerate(zip(times, accuracies, strict=True))],
        "val_loss": [Point(t, 10 * (i + 1), i, 1 - a) for i, (t, a) in enumerate(zip(times, accuracies, strict=True))],
    }
    fields: dict[str, Any] = {
        "seconds_process": seconds + 6,
        "seconds_fit": seconds,
        "steps": 10 * len(accuracies),
        "history": history,
        "metrics": {"val_loss": 1 - accuracies[-1], "val_acc": accuracies[-1], "train_loss": 0.25},
        "monitored": ["val_loss", "val_acc"],
        "peak_memory_bytes": 1_000_000,
        "memory_kind": "resident",
        "optimizer_state_bytes": 8_000,
        "parameters": 1_000,
        "nonzeros": 1_000,
        "model_bytes": 4_500,
        "model_bytes_compressed": 4_000,
        "environment": {"python": "3.11.0", "torch": "2.6.0"},
    }
    return Run(side, seed, "finished", **{**fields, **changes})
