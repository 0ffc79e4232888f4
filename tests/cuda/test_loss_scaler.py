"""Every method under a loss scaler at work (``precision="16-mixed"``), which skips steps and finds its scale."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from tests.conformance.toy import Digits, assert_same_training, run
from tests.methods import METHODS, STACKS, Method

pytestmark = [pytest.mark.cuda, pytest.mark.slow]

REFUSED = {
    "OptimizerInBackward": "precision='16-mixed': its scaler looks at all gradients.*Use 'bf16-mixed'",
    "OptimizerInBackward + GradualPruning + LowBitOptimizer": "precision='16-mixed': its scaler looks at all gradients",
}
OTHER = ["LowBitOptimizer stochastic rounding"]  # it sets a precision of its own
# Their steps do not go on from the gradient alone: a rounding takes another way.
FAR = {"Muon"}

HALF = {"precision": "16-mixed"}
module = partial(Digits, regular=False, optimizer="sgd", scheduler=None)
cases = [pytest.param(method, id=method.name) for method in [*METHODS, *STACKS] if method.name not in OTHER]


@pytest.mark.parametrize("method", cases)
def test_a_loss_scaler(method: Method) -> None:
    if method.name in REFUSED:
        with pytest.raises(MisconfigurationException, match=REFUSED[method.name]):
            run(method.make(), module, **HALF)
        return
    half, full = run(method.make(), module, **HALF), run(method.make(), module)
    assert all(torch.isfinite(value).all() for value in half.weights.values())
    assert half.trainer.global_step == full.trainer.global_step
    late, expected = (list(result.trace.values())[-6:] for result in (half, full))
    if method.name not in FAR:
        assert sum(late) == pytest.approx(sum(expected), rel=0.2)


def has_neutral(method: Method) -> bool:
    return method.name not in REFUSED and method.neutral is not None and not method.neutral_warning


@pytest.mark.parametrize("method", [case for case in cases if has_neutral(case.values[0])])
def test_neutral(method: Method) -> None:
    assert_same_training(run(method.make(neutral=True), Digits, **HALF), run(module=Digits, **HALF), method.name)
