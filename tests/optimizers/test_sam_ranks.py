"""SAM on two ranks: under DDP, FSDP2 and ZeroRedundancyStrategy. The runs are in sam_scenarios.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.compare import assert_close, assert_equal
from tests.conformance.processes import made_once
from tests.optimizers.sam_scenarios import STRATEGIES, callbacks, module
from tests.strategies.fully_shard_fits import BATCHES, fit
from tests.strategies.launch import launch, outcome

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sam"), pytest.mark.timeout(400)]
TAIL = 1 + 3 + 2 + 2 * BATCHES  # passes that are left at the checkpoint, which is in the second window


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(
        tmp_path_factory, "sam", lambda folder: launch("tests.optimizers.sam_scenarios", folder, list(STRATEGIES))
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_resumed_in_a_window_is_the_same_on_each_rank(two_ranks: Path, name: str) -> None:
    for rank in (0, 1):
        result = outcome(two_ranks, name, rank)
        assert len(result["whole"]["losses"]) == 2 * 2 * BATCHES
        assert result["resumed"]["losses"] == result["whole"]["losses"][-TAIL:]
        assert_equal(result["resumed"]["weights"], result["whole"]["weights"], "resumed")
    assert_equal(outcome(two_ranks, name, 1)["whole"]["weights"], result["whole"]["weights"], "the ranks")
    assert outcome(two_ranks, name, 0)["whole"]["losses"] != result["whole"]["losses"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_ranks_climb_to_where_one_would(two_ranks: Path, name: str) -> None:
    single, plain = fit("auto", module, callbacks)[2], fit("auto", module, lambda: callbacks()[1:])[2]
    ranks = [outcome(two_ranks, name, rank)["whole"] for rank in (0, 1)]
    assert_close(ranks[0]["weights"], single["weights"], 1e-5, "two ranks against one")
    losses = [(a + b) / 2 for a, b in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert losses == pytest.approx(single["losses"], abs=1e-5)
    with pytest.raises(AssertionError, match="without SAM"):
        assert_close(plain["weights"], single["weights"], 1e-3, "without SAM")


def test_split_steps_are_those_of_ddp_bit_for_bit(two_ranks: Path) -> None:
    for rank in (0, 1):
        assert_equal(outcome(two_ranks, "zero redundancy", rank), outcome(two_ranks, "ddp", rank), "split")
