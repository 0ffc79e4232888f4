"""The resume law: for every method, in mid-epoch, in mid-window and at an epoch's end, in a new process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from lightning_accel import ExactResume
from tests.conformance.resume import FRESH, ROWS, check_resume, points
from tests.conformance.rows import METHOD_ROWS, RIGHT_ROWS, WORLD_ROWS, WRONG_ROWS
from tests.conformance.toy import Digits, Stream, run, train_set

pytestmark = [pytest.mark.xdist_group("resume"), pytest.mark.timeout(900)]

CASES = [
    pytest.param(row.name, point, marks=[pytest.mark.slow] if row.slow else [])
    for row in [*METHOD_ROWS, *WORLD_ROWS, *RIGHT_ROWS]
    for point in [FRESH, *points(row)]
]


@pytest.mark.parametrize(("name", "point"), CASES)
def test_resume(resume_runs: Path, name: str, point: str) -> None:
    check_resume(resume_runs, ROWS[name], point)


@pytest.mark.parametrize("stateful", [False, True])
def test_what_cannot_be_resumed_exactly_is_said(stateful: bool) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader if stateful else DataLoader
    with pytest.warns(UserWarning, match="ExactResume can't save the position in the training data"):
        run([ExactResume()], partial(Digits, scheduler=None), train=lambda: loader(Stream(train_set()), batch_size=8))


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.name for row in WRONG_ROWS])
@pytest.mark.parametrize("point", ["mid-epoch", "epoch's end"])
def test_a_wrong_method_is_flagged(resume_runs: Path, name: str, point: str) -> None:
    check_resume(resume_runs, ROWS[name], FRESH)
    with pytest.raises(AssertionError, match="the losses of the batches"):
        check_resume(resume_runs, ROWS[name], point)
