"""Two processes: gradients are reduced once a window, replicas stay equal, and a window is one big batch of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_accel import GradientAccumulation
from lightning_accel.accumulation.noise_scale import gradient_and_noise, noise_scale
from tests.accumulation.noisy import noise_loader
from tests.accumulation.rank_scenarios import (
    NOISE,
    NOISY_BATCHES,
    NOISY_SCALE,
    SCENARIOS,
    SENTENCES,
    SOME,
    STRATEGIES,
    TINY,
)
from tests.accumulation.text import Batch, Steps, Text, adamw, by_hand, joined, make_batches, one_cycle
from tests.conformance.processes import made_once
from tests.hooks.common import Tiny, fit, samples
from tests.strategies.launch import launch, outcome

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("accumulation"), pytest.mark.timeout(400)]

RANKS = 2
WINDOWS = {
    "constant": [3, 2],
    "schedule": [1, 1, 1, 1, 1, 2, 2, 1],
    "fraction of a time": [1, 1, 1, 2],
    "unknown length": [2, 2, 1],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        launch("tests.accumulation.rank_scenarios", folder, list(SCENARIOS), RANKS)

    return made_once(tmp_path_factory, "accumulation", fill)


def found(runs: Path, name: str) -> list[dict[str, Any]]:
    """What each rank found; all have the same weights and steps."""
    both = [outcome(runs, name, rank) for rank in range(RANKS)]
    assert torch.equal(both[0]["weights"], both[1]["weights"])
    assert both[0]["ends"] == both[1]["ends"]
    return both


def expected(ends: list[int], configure: Any = None, clip: float = 0.0, batches: list[Batch] = SENTENCES) -> Tensor:
    """The weights after plain steps on the big batches of both ranks."""
    per_epoch, windows, begin = len(batches) // RANKS, [], 0
    for end in ends:
        first = begin % per_epoch
        windows.append(batches[RANKS * first : RANKS * (first + end - begin)])
        begin = end
    return by_hand(windows, Text(configure) if configure else Text(), clip)[0]


@pytest.mark.parametrize("name", TINY)
def test_one_reduction_a_window_and_the_gradient_of_the_global_batch(name: str, runs: Path) -> None:
    windows, result = WINDOWS[name], found(runs, name)[0]
    assert result["steps"] == len(windows)
    assert result["reduced"] == [sum(windows[: number + 1]) - 1 for number in range(len(windows))]
    # by hand: plain steps on the global batches, of two micro-batches a rank each
    reference, (x, y), begin = Tiny(), samples(10).tensors, 0
    for length in windows:
        part = slice(begin, begin + 8 * length)
        reference.zero_grad()
        ((reference.layer(x[part]) - y[part]) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
        begin = (begin + 8 * length) % 40
    weights = torch.nn.utils.parameters_to_vector(reference.parameters()).detach()
    torch.testing.assert_close(result["weights"], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_by_tokens_a_window_of_both_ranks_is_one_big_batch(name: str, runs: Path) -> None:
    result = found(runs, f"tokens {name}")[0]
    assert result["ends"] == [3, 5, 8, 10]
    torch.testing.assert_close(result["weights"], expected(result["ends"]), rtol=1e-5, atol=1e-6)
    clipped = found(runs, f"clipped {name}")[0]
    torch.testing.assert_close(clipped["weights"], expected([3, 5], clip=0.1), rtol=1e-5, atol=1e-6)


def test_by_tokens_a_factor_of_one_weighs_the_ranks(runs: Path) -> None:
    result = found(runs, "factor of one")[0]
    torch.testing.assert_close(result["weights"], expected([1, 2, 3, 4, 5]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_counts_on_one_rank_or_on_none(name: str, runs: Path) -> None:
    first, second = found(runs, f"nothing {name}")
    assert first["ends"] == [2, 4, 5]
    assert first["steps"] == 3
    assert ["Nothing counts in the batches up to number 3" in text for text in first["said"]] == [True]
    assert not second["said"]
    final, _ = by_hand([SOME[:4], SOME[8:]], Text(adamw))
    torch.testing.assert_close(first["weights"], final, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_all_ranks_end_a_window_of_tokens_together(name: str, runs: Path) -> None:
    result = found(runs, f"target {name}")[0]
    counts = [int((joined(SENTENCES[n : n + 2])["labels"] != -100).sum()) for n in range(0, 10, 2)]
    ends, sum_ = [], 0
    for number, count in enumerate(counts, start=1):
        sum_ += count
        if sum_ >= 40 or number == len(counts):
            ends, sum_ = [*ends, number], 0
    assert result["ends"] == ends
    assert 1 < len(ends) < len(counts)
    torch.testing.assert_close(result["weights"], expected(ends), rtol=1e-5, atol=1e-6)


def test_when_ranks_talk(runs: Path) -> None:
    fixed, target = found(runs, "talk fixed")[0], found(runs, "talk target")[0]
    assert fixed["reduced"] == [2, 4]
    assert fixed["others"] == [0, 2, 4]  # the size of counts once, then the count of each window
    assert target["reduced"] == [end - 1 for end in target["ends"]]
    assert set(target["others"]) == set(range(5))  # each batch asks whether it is the last


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "target"])
def test_a_resume_inside_a_window_has_the_counts_of_all_ranks(name: str, runs: Path) -> None:
    both = [outcome(runs, f"resumed {name}", rank) for rank in range(RANKS)]
    for result in both:
        assert result["whole"]["ends"][0] > 2
        assert torch.equal(result["whole"]["weights"], result["resumed"]["weights"])
        assert result["whole"]["ends"] == result["resumed"]["ends"]


def test_the_factor_follows_from_the_number_of_ranks_also_when_a_run_goes_on_with_fewer(runs: Path) -> None:
    result = found(runs, "target")[0]
    assert result["ends"] == [3, 6, 9, 12]
    data = DataLoader(make_batches([1] * 12), batch_size=1, collate_fn=joined)  # type: ignore[arg-type]
    steps, callback = Steps(), GradientAccumulation(target_batch_size=6)
    fit(Text(one_cycle), callback, steps, data=data, max_epochs=2, ckpt_path=runs / "target.ckpt")
    assert [end - steps.ends[0] for end in steps.ends] == [0, 6]


def test_a_loss_that_is_not_finite_on_one_rank_is_said_by_all(runs: Path) -> None:
    first, second = (outcome(runs, "infinite", rank) for rank in range(RANKS))
    assert ["on rank 0 (though the losses here are finite)" in text for text in first["said"]] == [True]
    assert ["on rank 1 (the loss of batch 1)" in text for text in second["said"]] == [True]


def noise_by_hand(length: int) -> float:
    """The noise scale of windows of so many batches of both ranks, in batches: the averages of both estimates."""
    batches = [x.double().mean(0) for (x,) in noise_loader(NOISY_BATCHES, NOISY_SCALE)]
    kept, size = [0.0, 0.0], RANKS * length
    for number, begin in enumerate(range(0, len(batches), size), start=1):
        window = batches[begin : begin + size]
        small = torch.stack([gradient.square().sum() for gradient in window[:RANKS]]).mean()
        large = torch.stack(window).mean(0).square().sum()
        found = gradient_and_noise(float(small), float(large), 1, len(window))
        keep = min(0.95, 1 - 1 / number)
        kept = [keep * old + (1 - keep) * new for old, new in zip(kept, found, strict=True)]
    return noise_scale(*kept)


@pytest.mark.parametrize("name", NOISE)
def test_noise_between_ranks(name: str, runs: Path) -> None:
    both = [outcome(runs, f"noise {name}", rank) for rank in range(RANKS)]
    for what in ("factor", "noise", "ends", "measured"):
        assert both[0]["whole"][what] == both[1]["whole"][what], what
    for result in both:
        assert torch.equal(result["whole"]["weights"], result["resumed"]["weights"])
        for what in ("factor", "noise", "measured"):
            assert result["whole"][what] == result["resumed"][what], what
    found, (_, low, high) = both[0]["whole"], NOISE[name]
    if low == high:
        assert found["measured"] == len(found["ends"])
        assert found["noise"] == pytest.approx(noise_by_hand(low), rel=1e-4)
    else:
        assert found["factor"] > low  # the scale is that of 6 batches of both
