"""Every method under ``Trainer(accumulate_grad_batches=2)``, with a last window of one batch."""

from __future__ import annotations

import math

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.conformance.cases import cases, wrong
from tests.conformance.toy import BATCHES, EPOCHS, run
from tests.methods import Method

STEPS = [batch + epoch * BATCHES for epoch in range(EPOCHS) for batch in [2, 4, 6, 8, 9]]


def check_accumulation(method: Method) -> None:
    if method.accumulation:
        with pytest.raises(MisconfigurationException, match=method.accumulation):
            run(method.make(), accumulate_grad_batches=2)
        return
    result = run(method.make(), accumulate_grad_batches=2)
    assert result.trainer.global_step == len(STEPS) == EPOCHS * math.ceil(BATCHES / 2)
    assert result.moved == STEPS, "weights move after other batches than those that end a window"
    assert all(math.isfinite(loss) for loss in result.trace.values())


@pytest.mark.parametrize("method", cases())
def test_accumulation(method: Method) -> None:
    check_accumulation(method)


@pytest.mark.parametrize("name", ["EveryMicroBatch", "PerMicroBatch"])
def test_a_wrong_method_is_flagged(name: str) -> None:
    with pytest.raises(AssertionError, match="weights move after other batches"):
        check_accumulation(wrong(name))


def test_a_missing_refusal_is_flagged() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_accumulation(wrong("UnsaidNeutral", accumulation="remove it"))
