"""Every method under ZeRO and FSDP2: the numbers of DDP, the resume law and the neutral law; or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.strategies import (
    AS_DDP,
    REFUSES,
    ROWS,
    WORKS,
    check_as_under_ddp,
    check_neutral,
    check_refused,
    check_resumed,
)
from tests.methods import METHODS, STRATEGY_NAMES

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("strategies"), pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", AS_DDP)
def test_as_under_ddp(strategy_runs: Path, name: str) -> None:
    check_as_under_ddp(strategy_runs, name)


@pytest.mark.parametrize("name", WORKS)
def test_resumed(strategy_runs: Path, name: str) -> None:
    check_resumed(strategy_runs, name)


@pytest.mark.parametrize("name", WORKS)
def test_neutral(strategy_runs: Path, name: str) -> None:
    check_neutral(strategy_runs, name)


@pytest.mark.parametrize("name", REFUSES)
def test_refused_with_a_reason_on_every_rank(strategy_runs: Path, name: str) -> None:
    strategy, _, row = name.partition(": ")
    check_refused(strategy_runs, name, ROWS[row].refused[strategy])


def test_every_method_has_its_place_under_every_strategy() -> None:
    every = {f"{strategy}: {method.name}" for strategy in STRATEGY_NAMES for method in METHODS}
    assert every <= {*WORKS, *REFUSES} and not set(WORKS) & set(REFUSES)
    for method in METHODS:
        assert set(method.refused) <= set(STRATEGY_NAMES), method.name


@pytest.mark.parametrize("name", ["zero2: HiddenCounter"])
def test_what_does_not_reach_the_gradients_is_flagged(strategy_runs: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="the losses: "):
        check_as_under_ddp(strategy_runs, name)


@pytest.mark.parametrize("name", ["zero2: HiddenScale", "fsdp2: HiddenScale"])
def test_hidden_state_is_flagged(strategy_runs: Path, name: str) -> None:
    check_as_under_ddp(strategy_runs, name)
    with pytest.raises(AssertionError, match="the losses of the batches"):
        check_resumed(strategy_runs, name)


@pytest.mark.parametrize("name", ["zero2: NeutralDraw"])
def test_what_is_not_neutral_is_flagged(strategy_runs: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="with neutral settings"):
        check_neutral(strategy_runs, name)


@pytest.mark.parametrize("name", ["zero2: NeutralDraw"])
def test_what_is_not_refused_is_flagged(strategy_runs: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="was not refused on rank 0"):
        check_refused(strategy_runs, name, "")
