"""Exact resume inside an epoch and an accumulation window, where DeepSpeed keeps gradients and options elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.compare import assert_equal
from tests.conformance.sharded_resume import NOT_EXACT, RESUMED
from tests.conformance.strategies import outcomes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("strategies"), pytest.mark.timeout(900)]


def check(folder: Path, name: str) -> None:
    """What was resumed has, bit for bit, the rest of the losses and rates, and the weights at the end."""
    for found in outcomes(folder, name):
        whole = found.pop("whole")
        assert len(found) == 2 and len(set(whole["losses"].values())) == 16
        for stop, resumed in found.items():
            for key in ("losses", "rates"):
                assert_equal(resumed[key], {n: whole[key][n] for n in resumed["losses"]}, f"{stop}: {key}")
            assert list(resumed["losses"]) == list(whole["losses"])[-len(resumed["losses"]) :]
            assert 0 < len(resumed["losses"]) < 16
            assert_equal(resumed["weights"], whole["weights"], stop)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_exactly(strategy_runs: Path, name: str) -> None:
    check(strategy_runs, name)


@pytest.mark.parametrize("name", NOT_EXACT)
def test_without_exact_resume_it_is_not_exact(strategy_runs: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="mid-window: losses"):
        check(strategy_runs, name)


@pytest.mark.parametrize("name", ["two trainers"])
def test_one_trainer_after_another_at_other_stages(strategy_runs: Path, name: str) -> None:
    first, second = outcomes(strategy_runs, name)
    for stages in first:  # 2, 3, 2 and 3, 1, 3: fitted, fitted on and tested, tested
        assert stages["tested"][0] == stages["tested"][1] == first[0]["tested"][0] < 1.05
        assert_equal(stages["weights"], first[0]["weights"], "other stages")
    assert_equal(first, second, "the ranks")
