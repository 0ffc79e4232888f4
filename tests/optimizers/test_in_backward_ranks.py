"""OptimizerInBackward on two ranks, under DDP and FSDP2. The runs are in in_backward_scenarios.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.compare import assert_equal
from tests.conformance.processes import made_once
from tests.optimizers.in_backward_scenarios import REFUSED, SAME
from tests.strategies.launch import launch, outcome

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("in backward"), pytest.mark.timeout(400)]

RESUMED = ["resumed ddp", "resumed fsdp2"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [*SAME, *RESUMED, "counted", "refused"]
    return made_once(
        tmp_path_factory, "in backward", lambda folder: launch("tests.optimizers.in_backward_scenarios", folder, names)
    )


@pytest.mark.parametrize("name", SAME)
def test_bit_for_bit_the_fit_without(two_ranks: Path, name: str) -> None:
    for rank in (0, 1):
        found = outcome(two_ranks, name, rank)
        assert found["in backward"]["steps"] == 14
        assert_equal(found["in backward"], found["plain"], name)
    weights = [outcome(two_ranks, name, rank)["in backward"]["weights"] for rank in (0, 1)]
    parameters = [{key: value for key, value in each.items() if "running" not in key} for each in weights]
    assert_equal(parameters[0], parameters[1], "the replicas")


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_mid_epoch(two_ranks: Path, name: str) -> None:
    for rank in (0, 1):
        found = outcome(two_ranks, name, rank)
        assert_equal(found["resumed"]["losses"], found["whole"]["losses"][5:], name)
        assert_equal(found["resumed"]["weights"], found["whole"]["weights"], name)


def test_one_gradient_and_the_one_that_is_on_its_way(two_ranks: Path) -> None:
    for rank in (0, 1):
        plain, inside = outcome(two_ranks, "counted", rank)
        assert plain == 22 and inside <= 2


REASONS = {
    "a compressing hook": "can't work with `ddp_comm_hook` of DDPStrategy, since it reduces gradients itself: remove",
    "ZeroRedundancyStrategy": "ZeroRedundancyStrategy: each rank steps its part.*Use FullyShardStrategy",
    "a step without its closure": r"is one that was not, so it was not averaged.*Call `optimizer.step\(closure\)`",
    "sparse gradients": "Expected dense gradients.*sparse=False",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(two_ranks: Path, name: str) -> None:
    for rank in (0, 1):
        message = outcome(two_ranks, "refused", rank).get(name, "not refused")
        assert re.search(REASONS[name], message), message
