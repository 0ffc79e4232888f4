"""ScheduleFree on two ranks: under DDP and FSDP2. The runs are in schedule_free_scenarios.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conformance.processes import made_once
from tests.optimizers.schedule_free_scenarios import STRATEGIES
from tests.strategies.launch import launch, outcome

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("schedule free"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        launch("tests.optimizers.schedule_free_scenarios", folder, list(STRATEGIES))

    return made_once(tmp_path_factory, "schedule_free", make)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", STRATEGIES)
def test_evaluation_changes_nothing_and_a_resume_is_exact(two_ranks: Path, name: str, rank: int) -> None:
    result = outcome(two_ranks, name, rank)
    whole, resumed = result["whole"], result["resumed"]
    assert whole["losses"] == result["unvalidated"]["losses"]
    assert resumed["losses"] == whole["losses"][3:]
    assert resumed["evaluated"] == whole["evaluated"][-len(resumed["evaluated"]) :]
    for weight, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][weight], value), weight
        assert torch.equal(result["unvalidated"]["weights"][weight], value), weight


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_average_is_that_of_ddp(two_ranks: Path, name: str) -> None:
    for rank in (0, 1):
        expected, got = outcome(two_ranks, "ddp", rank), outcome(two_ranks, name, rank)
        for weight, value in expected["whole"]["weights"].items():
            torch.testing.assert_close(got["whole"]["weights"][weight], value, rtol=0, atol=1e-5, msg=weight)
        assert got["whole"]["evaluated"] == pytest.approx(expected["whole"]["evaluated"], abs=1e-5)
        assert got["tested"] == pytest.approx(expected["tested"], abs=1e-5)


def test_ranks_agree(two_ranks: Path) -> None:
    first, second = (outcome(two_ranks, "ddp", rank)["whole"] for rank in (0, 1))
    assert first["losses"] != second["losses"]
    for weight, value in first["weights"].items():
        assert torch.equal(second["weights"][weight], value), weight
