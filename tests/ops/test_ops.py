"""ZeROStrategy with the ops that DeepSpeed compiles, minutes each the first time: `make test-ops`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conformance.compare import assert_equal
from tests.conformance.processes import made_once
from tests.ops.scenarios import SCENARIOS, WIDTH
from tests.strategies.launch import launch, outcome

pytestmark = [pytest.mark.ops, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(
        tmp_path_factory, "ops", lambda folder: launch("tests.ops.scenarios", folder, [*SCENARIOS], seconds=3000)
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_numbers_of_ddp(runs: Path, name: str) -> None:
    for rank in (0, 1):
        result = outcome(runs, name, rank)
        ours, ddp = result["ours"], result["ddp"]
        assert ours["step"] == ddp["step"] == len(ddp["losses"]) == 16
        assert ours["losses"] == pytest.approx(ddp["losses"], abs=1e-4, rel=0)
        for key, value in ddp["weights"].items():
            torch.testing.assert_close(ours["weights"][key], value, atol=1e-4, rtol=0, msg=key)


@pytest.mark.parametrize("name", SCENARIOS)
def test_goes_on_from_the_middle(runs: Path, name: str) -> None:
    """From other weights, with the losses and weights of the uninterrupted run, bit for bit."""
    result = outcome(runs, name)
    assert result["resumed"]["losses"] == result["ours"]["losses"][8:]
    assert_equal(result["resumed"]["weights"], result["ours"]["weights"], "weights")


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_op_runs(runs: Path, name: str) -> None:
    """DeepSpeed's optimizer where it was asked for; and the state of the large layer is on the disk."""
    result = outcome(runs, name)
    if name not in ("nvme torch", "nvme optimizer"):
        assert result["optimizer"] == "DeepSpeedCPUAdam"
    if name.startswith("nvme"):
        assert result["bytes"] >= WIDTH * WIDTH * 4 * 3  # two moments and the master copy, of both ranks
