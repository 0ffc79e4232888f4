"""The neutral law: settings that ask for nothing give, bit for bit, the run without the callback."""

from __future__ import annotations

from functools import partial

import pytest

from lightning_accel import NoEffectWarning
from tests.conformance.cases import cases, wrong
from tests.conformance.toy import Digits, assert_same_training, plain_run, run, trained_otherwise
from tests.methods import METHODS, Method

MODULES = {"adamw": Digits, "sgd": partial(Digits, optimizer="sgd", scheduler="SequentialLR")}


def check_neutral(method: Method, module: str) -> None:
    if method.neutral_warning:
        with pytest.warns(NoEffectWarning, match=method.neutral_warning):
            result = run(method.make(neutral=True), MODULES[module])
    else:
        for callback in method.make(neutral=True):
            assert callback.is_neutral, f"{type(callback).__name__} does not say that it is neutral"
        result = run(method.make(neutral=True), MODULES[module])
    assert_same_training(result, plain_run(MODULES[module]), f"neutral {method.name}")


def check_acts(method: Method) -> None:
    """The configuration of every other check does something, or they would all be void."""
    assert method.silent or not all(callback.is_neutral for callback in method.make()), "says that it is neutral"
    acts = trained_otherwise(run(method.make()), plain_run())
    assert acts or method.silent, "it does nothing"
    assert not (acts and method.silent), f"it changes the run, though the table says: {method.silent}"


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("method", cases(METHODS))
def test_neutral(method: Method, module: str) -> None:
    check_neutral(method, module)


@pytest.mark.parametrize("method", cases())
def test_acts(method: Method) -> None:
    check_acts(method)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NotNeutral", "neutral NotNeutral"),
        ("NeutralDraw", "the losses of the batches"),
        ("UnsaidNeutral", "does not say that it is neutral"),
    ],
)
def test_a_wrong_method_is_flagged(name: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_neutral(wrong(name), "adamw")


def test_a_method_that_does_nothing_is_flagged() -> None:
    with pytest.raises(AssertionError, match="it does nothing"):
        check_acts(wrong("UnsaidNeutral"))
    with pytest.raises(AssertionError, match="though the table says"):
        check_acts(wrong("HiddenCounter", silent="it is said to change nothing"))
