"""The resume law, checked with two processes: one makes every uninterrupted run, the other resumes all of them.

    python -m tests.conformance.resume uninterrupted FOLDER
    python -m tests.conformance.resume resumed FOLDER

FOLDER/rows.json names the rows. The first process saves checkpoints while its runs go on; none of them ends there.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.conformance.compare import assert_equal
from tests.conformance.processes import start, wait
from tests.conformance.rows import METHOD_ROWS, RIGHT_ROWS, WORLD_ROWS, WRONG_ROWS, Row
from tests.conformance.toy import run

ROWS = {row.name: row for row in [*METHOD_ROWS, *WORLD_ROWS, *WRONG_ROWS, *RIGHT_ROWS]}

# 9 batches an epoch. A window of 2 holds batches 13 and 14 (counted from 1) of the run: one is done at 14.
POINTS = {
    "mid-epoch": ("train batch end", 13),
    "mid-window": ("train batch end", 14),
    "validation in an epoch": ("validation end", 15),
    "last batch of an epoch": ("train batch end", 18),
    "validation at an epoch's end": ("validation end", 18),
    "epoch's end": ("train epoch end", 18),
}
FRESH = "not interrupted"  # the same run again, without saving anything on the way


def points(row: Row) -> dict[str, tuple[str, int]]:
    """The points that a row's run comes to."""
    return {name: when for name, when in POINTS.items() if row.name != "no validation" or "validation" not in name}


def folder_of(folder: Path, row: Row) -> Path:
    path = folder / row.name.replace(" ", "_").replace("'", "")
    path.mkdir(exist_ok=True)
    return path


def file_of(folder: Path, row: Row, point: str) -> Path:
    return folder_of(folder, row) / f"{point.replace(' ', '_')}.ckpt"


def uninterrupted(folder: Path, row: Row) -> None:
    saves = {file_of(folder, row, point): when for point, when in points(row).items()}
    result = run(row.make(), saves=saves, final=folder_of(folder, row) / "final.ckpt", **row.arguments())
    save_trace(folder_of(folder, row) / "trace.json", result.trace)


def resumed(folder: Path, row: Row) -> None:
    for point in points(row):
        path = file_of(folder, row, point)
        if not path.exists():
            continue  # the check says so
        result_of(path, row, seed=999, ckpt_path=path)  # another seed: other weights, another random state
    result_of(file_of(folder, row, FRESH), row)


def result_of(path: Path, row: Row, **arguments: Any) -> None:
    final = path.with_suffix(".resumed")
    try:
        result = run(row.make(), final=final, **row.arguments(), **arguments)
    except Exception:
        path.with_suffix(".error").write_text(traceback.format_exc())
    else:
        save_trace(path.with_suffix(".json"), result.trace)


def save_trace(path: Path, trace: dict[int, float]) -> None:
    path.write_text(json.dumps(trace))


def make_runs(folder: Path, names: list[str], filters: list[str]) -> None:
    """Both processes, one after the other."""
    (folder / "rows.json").write_text(json.dumps({"names": names, "filters": filters}))
    for number, phase in enumerate(["uninterrupted", "resumed"]):
        wait([start("tests.conformance.resume", phase, str(folder), PYTHONHASHSEED=str(number + 1))])


def check_resume(folder: Path, row: Row, point: str) -> None:
    """The resumed run's end is, bit for bit, that of the uninterrupted one."""
    error = folder_of(folder, row) / "uninterrupted.error"
    assert not error.exists(), error.read_text()
    path = file_of(folder, row, point)
    assert point == FRESH or path.exists(), f"the run of {row.name} never came to {point}"
    error = path.with_suffix(".error")
    assert not error.exists(), error.read_text()
    whole = json.loads((folder_of(folder, row) / "trace.json").read_text())
    tail = json.loads(path.with_suffix(".json").read_text())
    done = 0 if point == FRESH else POINTS[point][1]
    assert_equal(tail, {batch: loss for batch, loss in whole.items() if int(batch) > done}, "the losses of the batches")
    expected = torch.load(folder_of(folder, row) / "final.ckpt", weights_only=True)
    actual = torch.load(path.with_suffix(".resumed"), weights_only=True)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step", "epoch"):
        assert_equal(actual[key], expected[key], key)


def main(phase: str, folder: Path) -> None:
    from _pytest.config import apply_warning_filters

    request = json.loads((folder / "rows.json").read_text())
    with warnings.catch_warnings():
        ignored = [
            # "before the epoch ended and your dataloader is not resumable": what the row without ExactResume shows
            "ignore:You're resuming from a checkpoint that ended",
            "ignore:Your `IterableDataset` has `__len__` defined",  # advice for several workers
        ]
        apply_warning_filters([*request["filters"], *ignored], [])
        for name in request["names"]:
            if phase == "resumed":
                resumed(folder, ROWS[name])
                continue
            try:
                uninterrupted(folder, ROWS[name])
            except Exception:
                (folder_of(folder, ROWS[name]) / "uninterrupted.error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve())
