"""EMA on two ranks: under DDP, ZeRO and FSDP2. The runs are in ema_scenarios.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conformance.processes import made_once
from tests.optimizers.ema_scenarios import STRATEGIES
from tests.strategies.launch import launch, outcome

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ema"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [*STRATEGIES, "refused"]
    return made_once(tmp_path_factory, "ema", lambda folder: launch("tests.optimizers.ema_scenarios", folder, names))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", STRATEGIES)
def test_training_is_not_changed_and_resumes(two_ranks: Path, name: str, rank: int) -> None:
    result = outcome(two_ranks, name, rank)
    plain, whole, resumed = result["plain"], result["whole"], result["resumed"]
    assert whole["losses"] == plain["losses"]  # the trained weights come back after each validation, bit for bit
    assert whole["evaluated"][0] == plain["evaluated"][0]  # the sanity check
    assert whole["evaluated"][-1] != plain["evaluated"][-1]
    assert resumed["losses"][-7:] == whole["losses"][-7:]
    assert resumed["evaluated"][-1] == whole["evaluated"][-1]
    for weight, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][weight], value), weight


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "ddp"])
def test_averages_are_those_of_ddp(two_ranks: Path, name: str) -> None:
    for rank in (0, 1):
        expected, got = outcome(two_ranks, "ddp", rank), outcome(two_ranks, name, rank)
        for weight, value in expected["whole"]["weights"].items():
            torch.testing.assert_close(got["whole"]["weights"][weight], value, rtol=0, atol=1e-5, msg=weight)
        assert got["whole"]["evaluated"] == pytest.approx(expected["whole"]["evaluated"], abs=1e-5)
        assert got["tested"] == pytest.approx(expected["tested"], abs=1e-5)


def test_weights_out_of_reach_are_refused_on_every_rank(two_ranks: Path) -> None:
    for rank in (0, 1):
        on_disk, twice = outcome(two_ranks, "refused", rank)
        assert "EMA can't work with ZeROStrategy where the weights are on a disk" in on_disk
        assert "EMA can't work with ZeROStrategy where each node has a second copy" in twice
