"""LearningRateFinder on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.compare import assert_equal
from tests.conformance.processes import made_once
from tests.strategies.launch import launch, outcome
from tests.tuning.rate_scenarios import SCENARIOS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("learning rate"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        launch("tests.tuning.rate_scenarios", folder, list(SCENARIOS), 2)

    return made_once(tmp_path_factory, "learning_rate", fill)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_ranks_find_one_rate_and_train_as_if_configured_with_it(name: str, runs: Path) -> None:
    first, second = (outcome(runs, name, rank) for rank in range(2))
    assert first["rate"] == second["rate"] != 3e-3
    assert first["found"]["losses"] != second["found"]["losses"]  # each has data of its own
    for result in (first, second):
        assert_equal(result["found"], result["configured"], name)
    assert_equal(first["found"]["weights"], second["found"]["weights"], "the replicas")
