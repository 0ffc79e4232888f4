"""How large micro-batches may be follows from where memory ran out."""

from __future__ import annotations

import pytest

from lightning_accel.accumulation.auto_size import AutoSize


def sizes_of(limits: list[int], grow_after: int | None, batch: int = 16) -> list[int | None]:
    """The sizes at which batches were trained, where memory is enough for so many samples in each."""
    auto, found = AutoSize(grow_after), []
    for limit in limits:
        while (samples := min(auto.size or batch, batch)) > limit:
            auto.failed(samples)
        found.append(auto.size)
        auto.passed(split=samples < batch)
    return found


def test_it_halves_and_stays() -> None:
    assert sizes_of([16, 5, 16, 1], None) == [None, 4, 4, 1]
    auto = AutoSize()
    auto.failed(7)
    assert auto.size == 4  # rounded up


def test_it_grows_with_care() -> None:
    # the second batch after a change tries the double; it fails at 8, and waits for 4 batches, then for 8
    assert sizes_of([4] * 9, 2) == [4] * 9
    assert sizes_of([4] + [16] * 5, 2) == [4, 4, 8, 8, 16, 16]  # no batch is split any more: it grows no further


def test_a_failed_doubling_is_undone_and_waited_for_twice_as_long() -> None:
    auto = AutoSize(2)
    auto.failed(8)
    waits = []
    for _ in range(3):
        waits.append(1)
        while not auto.passed(split=True):
            waits[-1] += 1
        assert auto.size == 8
        auto.failed(7)  # a smaller batch of 7 was whole: the safe size is back, not 4 of its half
        assert auto.size == 4
    assert waits == [2, 4, 8]


def test_the_state_is_the_whole_of_it() -> None:
    auto = AutoSize(2)
    auto.failed(16)
    auto.passed(split=True)
    other = AutoSize(2)
    other.load_state_dict(auto.state_dict())
    for step in (auto.passed, other.passed):
        assert step(split=True)
    assert other.state_dict() == auto.state_dict()
    other.failed(16)
    assert other.size == 8


@pytest.mark.parametrize("split", [False, True])
def test_whole_batches_say_nothing_about_larger_ones(split: bool) -> None:
    auto = AutoSize(1)
    auto.failed(8)
    assert auto.passed(split=split) is split
