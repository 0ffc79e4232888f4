"""Two processes: memory runs out on one rank, and both make the step again; ranks with unequal batches; strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.accumulation.micro_scenarios import PLAIN, SCENARIOS, SHORT, SIZES, STRATEGIES, WINDOWS
from tests.conformance.processes import made_once
from tests.strategies.launch import launch, outcome

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("micro"), pytest.mark.timeout(600)]

RANKS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        launch("tests.accumulation.micro_scenarios", folder, list(SCENARIOS), RANKS, seconds=550)

    return made_once(tmp_path_factory, "micro", fill)


def both(runs: Path, name: str) -> list[Any]:
    return [outcome(runs, name, rank) for rank in range(RANKS)]


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Bit for bit: weights, buffers, random numbers, losses and what was logged."""
    for key in ("weights", "random"):
        assert torch.equal(a[key], b[key]), key
    for name, value in a["buffers"].items():
        assert torch.equal(value, b["buffers"][name]), name
    for key in ("losses", "logged", "epoch", "gradients", "seen"):
        assert a[key] == b[key], key


@pytest.mark.parametrize("name", SHORT)
def test_a_step_that_failed_leaves_no_trace(name: str, runs: Path) -> None:
    results = both(runs, name)
    assert sum(result["raised"] for result in results) > 0
    for result in results:
        assert_same(result["short"], result["same"])
        assert result["short"]["sizes"] == results[0]["short"]["sizes"]
        assert any(size is not None for size in result["short"]["sizes"])
    assert torch.equal(results[0]["short"]["weights"], results[1]["short"]["weights"])
    for rank, result in enumerate(results):
        count = sum(SIZES["uneven" if name == "uneven" else "even"][rank])
        epochs = len(result["short"]["seen"]) // count
        assert result["short"]["seen"] == sorted(list(range(count)) * epochs), "samples lost or seen twice"


def test_it_grows_together_and_waits_longer_after_a_failure(runs: Path) -> None:
    first, second = (result["short"]["sizes"] for result in both(runs, "grows"))
    assert first == second == [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]  # each larger one failed, and was made again
    assert both(runs, "grows")[0]["raised"] == 4  # at 8, then after 1, 2 and 4 batches


@pytest.mark.parametrize("name", PLAIN)
def test_whole_batches_are_ddp_bit_for_bit(name: str, runs: Path) -> None:
    for result in both(runs, name):
        if name != "sparse":  # there DDP halves the gradients of what shares memory with a sparse one, in place
            assert_same(result["auto"], result["plain"])
        assert_same(result["small"], result["fixed"])
        assert not torch.equal(result["small"]["weights"], result["auto"]["weights"])


def test_sparse_gradients_are_reduced_like_dense_ones(runs: Path) -> None:
    for sparse, dense in zip(both(runs, "sparse"), both(runs, "unused on one rank"), strict=True):
        for side in ("auto", "small", "fixed"):
            torch.testing.assert_close(sparse[side]["weights"], dense[side]["weights"], rtol=1e-6, atol=1e-6)


def test_values_of_all_ranks_are_logged_once_a_batch(runs: Path) -> None:
    for result in both(runs, "synced"):
        for side in ("fixed", "auto"):
            assert result[side]["means"] == pytest.approx(result["plain"]["means"], rel=1e-5)
        assert 2 in result["auto"]["sizes"]


def test_memory_that_is_counted(runs: Path) -> None:
    for result in both(runs, "budget"):
        assert result["short"]["sizes"] == both(runs, "budget")[0]["short"]["sizes"]
        assert result["short"]["sizes"][-1] is not None
        assert_same(result["short"], result["same"])


def test_a_resume_inside_a_window_has_the_size(runs: Path) -> None:
    for result in both(runs, "resumed"):
        whole, resumed = result["whole"], result["resumed"]
        assert resumed["sizes"] == whole["sizes"][2:]
        assert len(set(whole["sizes"])) > 1
        assert resumed["losses"] == whole["losses"][2:]
        assert torch.equal(resumed["weights"], whole["weights"])


def test_what_ends_a_run_ends_it_on_every_rank(runs: Path) -> None:
    first, second = both(runs, "a single sample")
    assert "in batch 0 of epoch 0 with a single sample" in first and "on another rank" in first
    assert "in batch 0 of epoch 0 with a single sample" in second and "CUDA out of memory" in second
    for text in both(runs, "sync batch norm"):
        assert "can't work with SyncBatchNorm on several ranks" in text
    for text in both(runs, "too few samples"):
        assert "Expected every rank to have at least 8 samples" in text and "but one has 3" in text


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "unused"])
def test_every_strategy_has_the_numbers_of_whole_batches(name: str, runs: Path) -> None:
    for result in both(runs, f"strategy {name}"):
        for split, plain in (("fixed", "plain"), ("window", "plain window")):
            torch.testing.assert_close(result[split]["weights"], result[plain]["weights"], rtol=1e-5, atol=1e-6)
            assert result[split]["losses"] == pytest.approx(result[plain]["losses"], rel=1e-5)
            assert result[split]["epoch"] == pytest.approx(result[plain]["epoch"], rel=1e-5)
            assert result[split]["seen"] == result[plain]["seen"]


@pytest.mark.parametrize(("strategy", "size", "window"), WINDOWS)
def test_by_tokens_with_nothing_that_counts_on_one_rank(strategy: str, size: Any, window: int, runs: Path) -> None:
    first, second = both(runs, f"tokens {strategy} {size} {window}")
    for result in (first, second):
        torch.testing.assert_close(result["split"]["weights"], result["plain"]["weights"], rtol=1e-5, atol=1e-6)
    texts = first["split"]["said"]
    assert any("Nothing counts in a micro-batch" in text and "on rank 0" in text for text in texts)
    assert any("Nothing counts in a whole batch" in text for text in texts)
    assert not second["split"]["said"]
