"""Two ranks on the CPU: one launch makes every method's run, a second one resumes those that are resumed.

    python -m tests.conformance.ranks FOLDER PHASE

with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment, as any launcher sets them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from tests.conformance.compare import assert_close, assert_equal
from tests.conformance.rows import EXACT, WRONG, Row, everything
from tests.conformance.toy import BATCH_SIZE, Digits, run, train_loader, train_set
from tests.methods import METHODS, STACKS, Method, use
from tests.strategies.launch import launch

RANKS = 2
POINT = ("train batch end", 14)  # in mid-epoch, and in mid-window of a window of two
# What else may differ between two ranks and one is batch norm, dropout and the order of the data.
SAME_BATCHES = {"module": partial(Digits, regular=False, optimizer="sgd"), "max_epochs": 2}

METHOD_ROWS = [
    Row(method.name, method.callbacks, lambda kind=method.optimizer: {"module": partial(Digits, False, kind)})
    for method in [*METHODS, *STACKS]
]
RESUME_ROWS = [Row("resumed ExactResume", [EXACT]), Row("resumed everything", everything())]
WRONG_ROWS = [
    Row("PerRank", [use(f"{WRONG}.PerRank")]),
    Row("PerWorldSize", [use(f"{WRONG}.PerWorldSize")]),
    Row("resumed nothing", []),
]
ROWS = {row.name: row for row in [*METHOD_ROWS, *RESUME_ROWS, *WRONG_ROWS]}


def scrambled() -> Digits:
    """Other weights and another random state than in the run that was interrupted."""
    torch.manual_seed(99 + int(os.environ["RANK"]))
    return Digits()


def file_of(folder: Path, name: str, rank: int, what: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.{what}.{rank}"


def run_row(folder: Path, row: Row, phase: str) -> None:
    """One row on this rank."""
    rank, checkpoint = int(os.environ["RANK"]), file_of(folder, row.name, 0, "ckpt")
    arguments: dict[str, Any] = {"train": partial(train_loader, batch_size=BATCH_SIZE // RANKS)}
    if row.name.startswith("resumed"):
        if phase == "uninterrupted":
            arguments["saves"] = {checkpoint: POINT}
        else:
            # Lightning's sampler takes the seed of `seed_everything`, which a resumed script sets to the same again
            arguments.update(ckpt_path=checkpoint, module=scrambled)
    else:
        # Lightning's own sampler would shuffle
        sampler = DistributedSampler(train_set(), RANKS, rank, shuffle=False)
        arguments["train"] = partial(train_loader, shuffle=False, batch_size=BATCH_SIZE // RANKS, sampler=sampler)
        arguments.update(SAME_BATCHES, **row.arguments())
    final = file_of(folder, row.name, 0, f"{phase}.final")
    result = run(row.make(), strategy="ddp", devices=RANKS, final=final, **arguments)
    assert result.trainer.world_size == RANKS
    weights = {name: value.detach() for name, value in result.trainer.lightning_module.named_parameters()}
    torch.save({"weights": weights, "trace": result.trace}, file_of(folder, row.name, rank, phase))


def make_runs(folder: Path, names: list[str], filters: list[str]) -> None:
    """Both launches, one after the other."""
    (folder / "rows.json").write_text(json.dumps({"names": names, "filters": filters}))
    for phase in ("uninterrupted", "resumed"):
        launch("tests.conformance.ranks", folder, [phase], RANKS)


def results(folder: Path, name: str, phase: str) -> list[dict[str, Any]]:
    """What each rank left of a row."""
    for rank in range(RANKS):
        error = file_of(folder, name, rank, f"{phase}.error")
        assert not error.exists(), error.read_text()
    return [torch.load(file_of(folder, name, rank, phase), weights_only=True) for rank in range(RANKS)]


def check_replicas(folder: Path, name: str) -> None:
    """After the run the ranks have the same weights, bit for bit."""
    first, second = results(folder, name, "uninterrupted")
    assert_equal(first["weights"], second["weights"], "the replicas")
    assert first["trace"] != second["trace"], "both ranks had the same data, so equal weights mean nothing"


def check_single(folder: Path, method: Method) -> None:
    """Two ranks train as one does with the same global batches."""
    single = run(method.make(), train=partial(train_loader, shuffle=False), **SAME_BATCHES)
    weights = dict(single.trainer.lightning_module.named_parameters())
    two = results(folder, method.name, "uninterrupted")[0]["weights"]
    assert method.single is not None, method.not_single
    assert_close(two, weights, method.single, "two ranks against one")


def check_resumed_replicas(folder: Path, name: str) -> None:
    """The resume law on each rank."""
    for whole, resumed in zip(results(folder, name, "uninterrupted"), results(folder, name, "resumed"), strict=True):
        tail = {batch: loss for batch, loss in whole["trace"].items() if batch > POINT[1]}
        assert_equal(resumed["trace"], tail, "the losses of the batches")
        assert_equal(resumed["weights"], whole["weights"], "the weights")


def main(folder: Path, phase: str) -> None:
    from _pytest.config import apply_warning_filters

    request = json.loads((folder / "rows.json").read_text())
    ignored = [
        "ignore:It is recommended to use `self.log:UserWarning",  # the toy logs each rank's own metrics
        "ignore:You're resuming from a checkpoint that ended",  # what the row without ExactResume shows
    ]
    with warnings.catch_warnings():
        apply_warning_filters([*request["filters"], *ignored], [])
        for name in request["names"]:
            if phase == "resumed" and not name.startswith("resumed"):
                continue
            try:
                run_row(folder, ROWS[name], phase)
            except Exception:
                error = file_of(folder, name, int(os.environ["RANK"]), f"{phase}.error")
                error.write_text(traceback.format_exc())


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
