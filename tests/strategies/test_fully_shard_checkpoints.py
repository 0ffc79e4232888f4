"""Checkpoints of FullyShardStrategy: resumed bit for bit, at any number of ranks, and with DDP in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conformance.compare import assert_equal
from tests.conformance.processes import made_once
from tests.strategies.fully_shard_checkpoint_scenarios import CHECKPOINTS
from tests.strategies.fully_shard_fits import BATCHES, Net
from tests.strategies.launch import launch, outcome
from tests.strategies.test_fully_shard import assert_same

MODULE = "tests.strategies.fully_shard_checkpoint_scenarios"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fully shard checkpoints"), pytest.mark.timeout(400)]
RESUMED = [name for name in CHECKPOINTS if name not in ("evaluated", "checkpoints", "second fit", "uneven")]
RESUMED.remove("after an exception")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, then of one and of four that go on from theirs, then of two that go on from that of one."""
    return made_once(tmp_path_factory, "fully_shard_checkpoints", make_runs)


def make_runs(folder: Path) -> None:
    launch(MODULE, folder / "two", [*CHECKPOINTS, "held"])
    launch(
        MODULE,
        folder / "one",
        ["held", "from two", "between epochs", "one file", "evaluated", "scalar in a window"],
        ranks=1,
    )
    launch(MODULE, folder / "four", ["from two", "held"], ranks=4)
    launch(MODULE, folder / "two_again", ["from one"])


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("ranks", ["two", "one"])
def test_resumes_bit_for_bit(folders: Path, name: str, ranks: str) -> None:
    """Losses, weights and optimizer state, in mid-epoch and in mid-window, from other weights and random numbers."""
    if ranks == "one" and name not in ("between epochs", "one file", "scalar in a window"):
        return
    for rank in range(2 if ranks == "two" else 1):
        result = outcome(folders / ranks, name, rank)
        plain, resumed = result["plain"], result["resumed"]
        done = len(plain["losses"]) - len(resumed["losses"])
        assert 0 < done < len(plain["losses"])
        assert plain["losses"][done:] == resumed["losses"]
        assert_equal(plain["weights"], resumed["weights"], "weights")
        assert_equal(*result["states"], "optimizer state")
        assert plain["steps"] == resumed["steps"]
        assert plain["rates"] == resumed["rates"]


@pytest.mark.parametrize(("saved", "goes_on"), [("two", "one"), ("two", "four"), ("one", "two_again")])
def test_resumes_on_another_number_of_ranks(folders: Path, saved: str, goes_on: str) -> None:
    """The batches are the same as a whole, so the weights must be those of the uninterrupted run, up to rounding."""
    name = f"from {saved}"
    plain, resumed = outcome(folders / saved, "between epochs")["plain"], outcome(folders / goes_on, name)
    assert len(resumed["losses"]) == BATCHES
    nothing = {"losses": [], "evaluated": []}
    assert_same({**plain, **nothing}, {**resumed, **nothing}, 1e-5)


@pytest.mark.parametrize("ranks", ["two", "one"])
def test_evaluates_a_checkpoint(folders: Path, ranks: str) -> None:
    """With a new module or the trained one, with other blocks; validate, test and predict."""
    result = outcome(folders / ranks, "evaluated")
    assert len(set(result["same"])) == 1
    assert_equal(*result["predicted"], "predictions")
    assert_equal(result["weights"], result["trained"], "weights")


def test_old_checkpoints_are_removed(folders: Path) -> None:
    result = outcome(folders / "two", "checkpoints")
    assert result["left"] == result["kept"]
    assert len(result["left"]) == 2


def test_checkpoint_of_one_file_is_a_plain_one(folders: Path) -> None:
    """As any Lightning checkpoint, read without Trainer and ranks, with ``weights_only=True``."""
    path = folders / "two" / "one.ckpt"
    module = Net.load_from_checkpoint(path, weights_only=True)
    saved = torch.load(path, weights_only=True)
    assert_equal(dict(module.state_dict()), dict(saved["state_dict"]), "weights")
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in (list(module.parameters())[:3], list(module.parameters())[3:])]
    )
    optimizer.load_state_dict(saved["optimizer_states"][0])


def test_a_module_fits_twice(folders: Path) -> None:
    result = outcome(folders / "two", "second fit")
    torch.testing.assert_close(result["sharded"], result["ddp"], rtol=0, atol=1e-5)


def test_a_module_fits_after_an_exception(folders: Path) -> None:
    """In a forward or a backward: what the interrupted window left is not in the next fit's gradients."""
    result = outcome(folders / "two", "after an exception")
    for losses in result["sharded"]:
        torch.testing.assert_close(losses, result["ddp"], rtol=0, atol=1e-5)


def test_ranks_may_predict_different_numbers_of_batches(folders: Path) -> None:
    first, second = (outcome(folders / "two", "uneven", rank) for rank in range(2))
    assert (first["batches"], second["batches"]) == (4, 3)
    assert max(first["difference"], second["difference"]) < 1e-5


@pytest.mark.parametrize(("folder", "ranks"), [("one", 1), ("two", 2), ("four", 4)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_bytes_of_a_rank(folders: Path, folder: str, ranks: int, precision: str) -> None:
    """Parameters, gradients and AdamW's two moments, each divided by the number of ranks."""
    result = outcome(folders / folder, "held", ranks - 1)
    share = result["parameters"] * (4 if precision == "32-true" else 2) / ranks
    for name, copies in {"parameters": 1, "gradients": 1, "optimizer": 2}.items():
        assert result[precision][name] == pytest.approx(copies * share, rel=0.02), name
