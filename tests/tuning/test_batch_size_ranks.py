"""BatchSizeFinder on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.compare import assert_equal
from tests.conformance.processes import made_once
from tests.conformance.toy import Digits
from tests.strategies.launch import launch, outcome
from tests.tuning.size_scenarios import FOUND, SCENARIOS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("batch size"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        launch("tests.tuning.size_scenarios", folder, list(SCENARIOS), 2)

    return made_once(tmp_path_factory, "batch_size", fill)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "counted"])
def test_the_ranks_find_one_size_and_train_as_if_configured_with_it(name: str, runs: Path) -> None:
    first, second = (outcome(runs, name, rank) for rank in range(2))
    assert first["size"] == second["size"] == FOUND
    assert first["found"]["losses"] != second["found"]["losses"]  # each has data of its own
    for result in (first, second):
        assert_equal(result["found"], result["configured"], name)
    assert_equal(first["found"]["weights"], second["found"]["weights"], "the replicas")
    here, there = ({size: reason for size, _, _, reason in result["results"]} for result in (first, second))
    assert here.keys() == there.keys()
    assert here["8"] == "out of memory on another rank" and there["8"] == "out of memory"
    assert here["6"] == there["6"] == ""


def test_what_ddp_reduces_counts(runs: Path) -> None:
    peaks = outcome(runs, "counted")
    weights = sum(parameter.nbytes for parameter in Digits().parameters())
    assert peaks[0] == peaks[1] > 5 * weights  # gradients twice, two moments
