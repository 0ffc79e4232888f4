"""Two ranks: equal replicas, the same training as on one rank where the maths allows it, and the resume law."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.cases import cases, wrong
from tests.conformance.ranks import METHOD_ROWS, RESUME_ROWS, check_replicas, check_resumed_replicas, check_single
from tests.methods import METHODS, STACKS, Method

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks"), pytest.mark.timeout(900)]

SINGLE = [method for method in [*METHODS, *STACKS] if method.single is not None]


@pytest.mark.parametrize("name", [row.name for row in [*METHOD_ROWS, *RESUME_ROWS]])
def test_replicas(rank_runs: Path, name: str) -> None:
    check_replicas(rank_runs, name)


@pytest.mark.parametrize(("name", "method"), [(m.name, m) for m in SINGLE], ids=[m.name for m in SINGLE])
def test_as_on_one_rank(rank_runs: Path, name: str, method: Method) -> None:
    check_single(rank_runs, method)


@pytest.mark.parametrize("method", cases())
def test_what_differs_from_one_rank_says_why(method: Method) -> None:
    assert (method.single is None) == bool(method.not_single)


@pytest.mark.parametrize("name", [row.name for row in RESUME_ROWS])
def test_resumed_replicas(rank_runs: Path, name: str) -> None:
    check_resumed_replicas(rank_runs, name)


@pytest.mark.parametrize("name", ["PerRank"])
def test_replicas_that_differ_are_flagged(rank_runs: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="the replicas"):
        check_replicas(rank_runs, name)


@pytest.mark.parametrize("name", ["PerWorldSize"])
def test_another_training_than_on_one_rank_is_flagged(rank_runs: Path, name: str) -> None:
    check_replicas(rank_runs, name)
    with pytest.raises(AssertionError, match="two ranks against one"):
        check_single(rank_runs, wrong(name))


@pytest.mark.parametrize("name", ["resumed nothing"])
def test_a_resume_that_is_not_exact_is_flagged(rank_runs: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="the losses of the batches"):
        check_resumed_replicas(rank_runs, name)
