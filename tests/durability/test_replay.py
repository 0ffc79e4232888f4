"""The position of a plain DataLoader, without any Trainer."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler

from lightning_accel.durability.replay import (
    forget,
    generator_states,
    is_watched,
    position,
    rewind,
    set_generator_states,
    unwatch,
    watch,
    why_not_exact,
)
from lightning_accel.hooks.rng import get_rng_state, set_rng_state
from tests.durability.runs import Samples, loader, seed

SIZE = 23


class PerIndex(Sampler):
    """Draws from all three global generators as each index is asked for, so its draws mix with those of training."""

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        for _ in range(SIZE):
            yield np.random.randint(SIZE) * random.randrange(2) or int(torch.randint(SIZE, ()))


class EagerBatches(Sampler):
    """Draws in ``__iter__`` itself: for workers the DataLoader calls that twice."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        return iter(torch.randperm(SIZE)[:18].view(6, 3).tolist())


class OwnIter(DataLoader):
    """Overrides ``__iter__`` with a generator, so that the real iterator is only made at the first batch."""

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


def make(kind: str, workers: int, persistent: bool) -> DataLoader:
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": persistent, "batch_size": 4}
    data, generator = Samples(SIZE), torch.Generator().manual_seed(3)
    if kind == "shuffle":
        return DataLoader(data, shuffle=True, **options)
    if kind == "own generator":
        return DataLoader(data, shuffle=True, generator=generator, **options)
    if kind == "with replacement":  # draws from the generator again every 32 indices
        sampler: Sampler = RandomSampler(data, replacement=True, num_samples=100, generator=generator)
        return DataLoader(data, sampler=sampler, **options)
    if kind == "weighted":
        return DataLoader(data, sampler=WeightedRandomSampler(torch.arange(SIZE) + 1.0, SIZE), **options)
    if kind == "per index":
        return DataLoader(data, sampler=PerIndex(), **options)
    if kind == "own iter":
        return OwnIter(data, shuffle=True, **options)
    options.pop("batch_size")
    return DataLoader(data, batch_sampler=EagerBatches(), **options)


def train(data: DataLoader, stop: tuple[int, int] | None = None, resume: Any = None) -> tuple[list[Any], Any]:
    """Three epochs that draw random numbers between the batches; what was seen and, at ``stop``, the state."""
    seen = []
    first_epoch = resume["stop"][0] if resume else 0
    for epoch in range(first_epoch, 3):
        batches = iter(data)
        index = 0
        if resume and epoch == first_epoch:
            index = resume["stop"][1]
            if isinstance(data, OwnIter):
                seen_early = next(batches)  # or the iterator is not made yet
            set_rng_state(resume["rng"])
            set_generator_states(data, resume["generators"])
            if isinstance(data, OwnIter):
                seen.append((epoch, index, seen_early[1].tolist(), torch.rand(1).item()))
                index += 1
        else:
            torch.rand(2)
        for _, numbers in batches:
            seen.append((epoch, index, numbers.tolist(), torch.rand(1).item()))
            index += 1
            if stop == (epoch, index):
                state = {"stop": [epoch, index], "position": position(data), "rng": get_rng_state()}
                return seen, state | {"generators": generator_states(data)}
    return seen, None


KINDS = ["shuffle", "own generator", "with replacement", "weighted", "per index", "own iter", "eager"]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_goes_on_where_it_was(kind: str, workers: int) -> None:
    for persistent in {False, workers > 0}:
        seed(0)
        plain, _ = train(make(kind, workers, persistent))
        for stop in [(1, 2)] if workers else [(0, 1), (1, 2), (2, 5)]:
            seed(0)
            data = make(kind, workers, persistent)
            watch(data)
            before, state = train(data, stop)
            assert before == plain[: len(before)], "watching changed what was drawn"
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            seed(99)
            data = make(kind, workers, persistent)
            watch(data)
            assert rewind(data, state["position"])
            after, _ = train(data, resume=state)
            assert before + after == plain, (persistent, stop)


def test_what_was_seen_is_not_loaded_again() -> None:
    data = loader()
    watch(data)
    batches = iter(data)
    for _ in range(4):
        next(batches)
    state = position(data)
    again = loader()
    watch(again)
    assert state is not None and rewind(again, state)
    next(iter(again))
    assert again.dataset.loaded == 4


def test_unused_batches_come_again() -> None:
    data = loader()
    watch(data)
    batches = iter(data)
    first, second = next(batches)[1].tolist(), next(batches)[1].tolist()
    for unused, expected in [(0, None), (1, second), (2, first)]:
        state = position(data, unused)
        again = loader()
        watch(again)
        assert state is not None and rewind(again, state)
        found = next(iter(again))[1].tolist()
        assert found == expected if expected else found not in (first, second)


def test_watching_is_undone() -> None:
    data = OwnIter(Samples(), batch_size=4)
    before = dict(vars(data))
    watch(data)
    watch(data)
    assert is_watched(data) and isinstance(data, OwnIter) and type(data).__name__ == "OwnIter"
    assert len(list(data)) == len(data) == 6
    unwatch(data)
    assert type(data) is OwnIter and vars(data) == before
    unwatch(data)
    assert len(list(data)) == 6


def test_unwatched_persistent_workers_go_on() -> None:
    data = loader(2, persistent_workers=True)
    assert len(list(data)) == 6  # the workers are there before the watching begins
    watch(data)
    batches = iter(data)
    next(batches)
    assert (position(data) or {})["seen"] == 1
    unwatch(data)
    assert len(list(data)) == 6


def test_passes_that_are_not_to_be_recorded_leave_the_position_alone() -> None:
    training = [True]
    data = loader()
    watch(data, recording=lambda: training[0])
    batches = iter(data)
    next(batches)
    training[0] = False
    assert len(list(data)) == 6
    assert (position(data) or {})["seen"] == 1


def test_a_forgotten_position_is_not_used() -> None:
    data = loader(shuffle=False)
    watch(data)
    batches = iter(data)
    next(batches)
    state = position(data)
    assert state is not None and rewind(data, state)
    forget(data)
    assert next(iter(data))[1].tolist() == [0, 1, 2, 3]


def test_other_data_is_refused() -> None:
    data = loader()
    watch(data)
    iter(data)
    state = position(data)
    assert state is not None
    other = loader(size=40)
    assert not rewind(other, state)
    watch(other)
    assert not rewind(other, state)


def test_there_is_no_position_before_a_pass() -> None:
    data = loader()
    assert position(data) is None
    watch(data)
    assert position(data) is None


def test_an_index_sampler_without_a_length() -> None:
    class Endless(Sampler):
        def __iter__(self) -> Iterator[int]:
            return iter(range(9))

    data = DataLoader(Samples(), batch_sampler=BatchSampler(Endless(), 2, drop_last=False))
    watch(data)
    with pytest.raises(TypeError):
        len(data)
    assert [len(numbers) for _, numbers in data] == [2, 2, 2, 2, 1]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def test_why_not_exact() -> None:
    assert why_not_exact(loader()) is None
    assert "Stream" in (why_not_exact(DataLoader(Stream())) or "")
    assert "list" in (why_not_exact([1, 2]) or "")
