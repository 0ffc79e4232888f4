"""ZeroRedundancyStrategy beside DDP on two ranks, its checkpoints at other numbers, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_accel
from lightning_accel.strategies.registry import zero1
from lightning_accel.strategies.sharded_optimizer import ShardedOptimizer, split_by_size
from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy
from tests.conformance.compare import assert_equal
from tests.conformance.processes import made_once
from tests.strategies.fully_shard_fits import BATCHES, Net
from tests.strategies.launch import launch, outcome
from tests.strategies.zero_redundancy_fits import SAME
from tests.strategies.zero_redundancy_scenarios import OTHERS, RESUMED

MODULE = "tests.strategies.zero_redundancy_scenarios"
pytestmark = [pytest.mark.xdist_group("zero redundancy"), pytest.mark.timeout(400)]
ALONE = [name for name in RESUMED if "single" in name or "between epochs" in name]
TOGETHER = [name for name in RESUMED if "single" not in name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one rank, then of two, then of one that goes on from there."""
    return made_once(tmp_path_factory, "zero_redundancy", make_runs)


def make_runs(folder: Path) -> None:
    launch(MODULE, folder / "one", [f"resumed {name}" for name in ALONE], ranks=1)
    launch(MODULE, folder / "two", [*SAME, *(f"resumed {name}" for name in TOGETHER), *OTHERS])
    launch(MODULE, folder / "one", ["elsewhere"], ranks=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_numbers_are_those_of_ddp_bit_for_bit(folders: Path, name: str) -> None:
    """Losses of every step, validation, weights, steps and rates; the inputs of both ranks differ."""
    ranks = [outcome(folders / "two", name, rank) for rank in range(2)]
    for result in ranks:
        assert_equal(result["ddp"], result["sharded"], name)
        assert result["sharded"]["losses"][0] != result["sharded"]["losses"][-1]
    assert ranks[0]["sharded"]["losses"] != ranks[1]["sharded"]["losses"]
    assert_equal(ranks[0]["sharded"]["weights"], ranks[1]["sharded"]["weights"], "replicas")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), [*(("one", name) for name in ALONE), *(("two", name) for name in TOGETHER)])
def test_resumes_bit_for_bit(folders: Path, ranks: str, name: str) -> None:
    """Losses, weights and the whole optimizer state, from other weights and random numbers; with DDP both ways."""
    for rank in range(2 if ranks == "two" else 1):
        result = outcome(folders / ranks, f"resumed {name}", rank)
        plain, again = result["plain"], result["resumed"]
        done = len(plain["losses"]) - len(again["losses"])
        assert 0 < done < len(plain["losses"])
        assert plain["losses"][done:] == again["losses"]
        for what in ("weights", "steps", "rates"):
            assert_equal(plain[what], again[what], what)
        if rank == 0:
            assert result["states"][0][0]["state"]
            assert_equal(*result["states"], "optimizer state")


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "goes_on"), [("one", "two"), ("two", "one")])
@pytest.mark.parametrize("name", ["between epochs", "low bit between epochs"])
def test_resumes_on_another_number_of_ranks(folders: Path, name: str, saved: str, goes_on: str) -> None:
    """The batches are the same as a whole, so the weights must be those of the uninterrupted run, up to rounding."""
    plain, again = outcome(folders / saved, f"resumed {name}")["plain"], outcome(folders / goes_on, "elsewhere")[name]
    assert len(again["losses"]) == BATCHES
    assert (plain["steps"], plain["rates"]) == (again["steps"], again["rates"])
    torch.testing.assert_close(plain["weights"], again["weights"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_checkpoint_is_a_plain_one(folders: Path) -> None:
    """As any Lightning checkpoint, read without Trainer and ranks, with ``weights_only=True``."""
    path = folders / "two" / "in_an_epoch.ckpt"
    module = Net.load_from_checkpoint(path, weights_only=True)
    saved = torch.load(path, weights_only=True)
    assert_equal(dict(module.state_dict()), dict(saved["state_dict"]), "weights")
    groups = [{"params": group} for group in (list(module.parameters())[:3], list(module.parameters())[3:])]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    assert len(optimizer.state) == len(list(module.parameters()))
    assert list(saved["optimizer_states"][0]["state"]) == list(range(len(optimizer.state)))


@pytest.mark.slow
def test_unfrozen_and_added_parameters_are_trained_as_in_plain_torch(folders: Path) -> None:
    ranks = [outcome(folders / "two", "later", rank) for rank in range(2)]
    for result in ranks:
        torch.testing.assert_close(result["sharded"], result["plain"], rtol=0, atol=1e-5)
        assert_equal(result["ddp"], result["sharded"], "RestartableDDPStrategy")
    assert_equal(ranks[0]["sharded"], ranks[1]["sharded"], "replicas")
    total = sum(result["bytes"] for result in ranks)
    assert all(0.4 < result["bytes"] / total < 0.6 for result in ranks)


@pytest.mark.slow
def test_each_rank_has_half_of_the_state(folders: Path) -> None:
    """After a fit, after a save, and where a checkpoint was loaded; Adagrad has its state before the first step."""
    ranks = [outcome(folders / "two", "bytes", rank) for rank in range(2)]
    plain = ranks[0]["plain"]
    for held in zip(*(result["found"] for result in ranks), strict=True):
        assert sum(held) == plain
        assert max(held) < 0.52 * plain
    whole = ranks[0]["low bit"][0]
    assert whole < 0.5 * plain and sum(result["low bit"][1] for result in ranks) == whole
    assert all(result["low bit"][1] < 0.6 * whole for result in ranks)
    one, other = (result["adagrad"] for result in ranks)
    assert 0.9 < one / other < 1.1 and one + other < 0.6 * plain  # one number a parameter, AdamW has two


WAY_OUT = "Use strategy='accel_ddp', where every rank steps all parameters."
ERRORS = {
    "LBFGS": f"MisconfigurationException: LBFGS can't be split: .* {WAY_OUT}",
    "twice": f"MisconfigurationException: Twice can't be split: it computes the loss more than once a step. {WAY_OUT}",
    "group norm": f"MisconfigurationException: GroupNorm can't be split: it makes `norm` of .* group 0 .* {WAY_OUT}",
    "other module": r"RuntimeError: The ranks have different modules: rank 0 has `head.weight \(8, 16\)",
    "other optimizer": "MisconfigurationException: `configure_optimizers` returned optimizers of other classes, groups",
    "state of a part": "RuntimeError: Each rank has its part of the state of WithMethod",
    "method": f"AttributeError: `evaluate` of WithMethod can't act on the part of a rank. {WAY_OUT}",
    "data": "42",
    "stage 2": r"ImportError: ZeROStrategy needs the package `deepspeed`: pip install 'lightning-accel\[deepspeed\]'.",
    "only deepspeed": "ImportError: accel_zero1 without deepspeed knows no `offload_optimizer`, `stage3`: leave that "
    r"out, or pip install 'lightning-accel\[deepspeed\]'.",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_is_an_error_on_every_rank(folders: Path, name: str) -> None:
    for rank in range(2):
        assert re.match(ERRORS[name], outcome(folders / "two", "errors", rank)[name])


@pytest.mark.slow
def test_says_what_it_is_and_what_has_no_effect_once(folders: Path) -> None:
    first, second = (outcome(folders / "two", "says", rank) for rank in range(2))
    assert len(first["lines"]) == 1
    assert first["lines"][0].startswith("deepspeed is not installed: accel_zero1 is ZeroRedundancyStrategy")
    assert first["warned"] == ["OwnList keeps a list of parameters of its own: each rank has the state of all of them."]
    assert second["lines"] == second["warned"] == []
    assert first["strategy"] == ["ZeroRedundancyStrategy", "AtomicCheckpointIO"]
    assert first["monitored"][0] == first["monitored"][1]  # the names of the rates


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_split_by_size(world: int) -> None:
    """Every parameter has a rank; the loads differ by no more than the largest parameter."""
    sizes = [7, 100, 3, 3, 50, 20, 1, 64]
    loads = [0] * world
    ranks = split_by_size(sizes, loads)
    assert loads == [sum(size for size, rank in zip(sizes, ranks, strict=True) if rank == own) for own in range(world)]
    assert max(loads) - min(loads) <= max(sizes)
    assert world > 3 or max(loads) <= 1.25 * sum(sizes) / world


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_parameters_that_cannot_be_sent_are_refused(kind: str) -> None:
    value = torch.eye(3).to_sparse() if kind == "sparse" else torch.empty(3, 3, device="meta")
    optimizer = torch.optim.SGD([torch.nn.Parameter(value)], lr=0.1)
    with pytest.raises(Exception, match=rf"one of SGD with the shape \(3, 3\) is {kind}. Train it with"):
        ShardedOptimizer(optimizer)


def test_a_wrapper_with_a_state_beside_is_refused() -> None:
    """Which would be that of rank 0 alone in a checkpoint."""
    optimizer = Lookahead([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(Exception, match=rf"Lookahead can't be split: what it saves as 'slow' can't .* {WAY_OUT}"):
        ShardedOptimizer(optimizer)


class Lookahead(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slow": {0: torch.zeros(3)}, "every": 5}


def test_accel_zero1_with_deepspeed_is_zero_strategy() -> None:
    pytest.importorskip("deepspeed")
    strategy = zero1(trained_later=["head"])
    assert isinstance(strategy, lightning_accel.ZeROStrategy)
    assert strategy.zero_stage_3 is False


@pytest.mark.parametrize("argument", ["timeout", "start_timeout"])
def test_arguments_are_checked(argument: str) -> None:
    arguments: dict[str, Any] = {argument: 0}
    with pytest.raises(ValueError, match=rf"Expected `{argument}` to be in \(0, inf\), but got 0"):
        ZeroRedundancyStrategy(**arguments)
