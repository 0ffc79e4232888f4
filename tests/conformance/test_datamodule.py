"""A batch hook that the LightningDataModule owns keeps working, and so does the method."""

from __future__ import annotations

import pytest

from tests.conformance.cases import SAMPLE, cases, wrong
from tests.conformance.toy import HookedData, HookedDigits, assert_same_training, plain_run, run, trained_otherwise
from tests.methods import Method


def check_datamodule(method: Method) -> None:
    result = run(method.make(), datamodule=HookedData())
    assert method.silent or trained_otherwise(result, plain_run(HookedDigits)), "it does nothing with a datamodule"
    assert_same_training(result, run(method.make(), HookedDigits), "the hook in the datamodule and in the module")


@pytest.mark.parametrize("method", cases(quick=SAMPLE))
def test_datamodule(method: Method) -> None:
    check_datamodule(method)


def test_a_patch_of_the_hook_that_does_not_run_is_flagged() -> None:
    with pytest.raises(AssertionError, match="it does nothing with a datamodule"):
        check_datamodule(wrong("ModuleHook"))


def test_a_method_that_sees_the_batch_before_the_hook_is_flagged() -> None:
    with pytest.raises(AssertionError, match="the hook in the datamodule and in the module"):
        check_datamodule(wrong("InsteadOfHook"))
