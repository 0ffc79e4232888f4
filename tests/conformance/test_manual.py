"""Under manual optimization a method works, or is refused with the reason and the way out."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.conformance.cases import cases, wrong
from tests.conformance.toy import ManualDigits, plain_run, run, trained_otherwise
from tests.methods import Method


def check_manual(method: Method) -> None:
    """The module steps two optimizers, so this is also the check of several optimizers."""
    if method.manual:
        with pytest.raises(MisconfigurationException, match=f"(?s){method.manual}"):
            run(method.make(), ManualDigits)
        return
    try:
        result = run(method.make(), ManualDigits)
    except Exception as error:
        raise AssertionError(f"it neither works nor is refused: {error!r}") from error
    assert all(torch.isfinite(weight).all() for weight in result.weights.values())
    assert method.silent or trained_otherwise(result, plain_run(ManualDigits)), "it does nothing"


@pytest.mark.parametrize("method", cases())
def test_manual(method: Method) -> None:
    check_manual(method)


def test_a_wrong_method_is_flagged() -> None:
    with pytest.raises(AssertionError, match="neither works nor is refused"):
        check_manual(wrong("Anywhere"))
    with pytest.raises(AssertionError, match="it does nothing"):
        check_manual(wrong("UnsaidNeutral"))


def test_a_wordless_refusal_is_flagged() -> None:
    with pytest.raises(ValueError, match="no"):
        check_manual(wrong("RefusesAll", manual="set `automatic_optimization = True`"))
