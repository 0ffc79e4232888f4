from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_accel import GradientAccumulation
from lightning_accel.hooks import Moment, count_steps
from tests.hooks.common import Tiny, fit, loader

UNITS = {"step": st.integers(0, 30), "batch": st.integers(0, 60), "epoch": st.sampled_from([0, 0.5, 1, 2.25, 4])}
KEYS = st.one_of(
    *(values.map(lambda value, unit=unit: f"{value}{unit}") for unit, values in UNITS.items()),
    st.sampled_from(["0fit", "0.25fit", "0.5fit", "0.9fit", "1fit"]),
)
FACTORS = st.one_of(st.integers(1, 7), st.dictionaries(KEYS, st.integers(1, 7), min_size=1, max_size=3))


def simulate(callback: GradientAccumulation, batches: int, epochs: int, max_steps: int) -> int:
    """A loop over batches, one after another, as the Trainer's: no window is skipped over, none is known before."""
    step = batch = 0
    for epoch in range(epochs):
        left = 0
        for index in range(batches):
            if left == 0:
                fractions = [(epoch + index / batches) / epochs] + ([step / max_steps] if max_steps > 0 else [])
                left = callback.next_factor(Moment(step, batch, epoch + index / batches, max(fractions)))
            left, batch = left - 1, batch + 1
            if left == 0 or index == batches - 1:
                step, left = step + 1, 0
                if step == max_steps:
                    return step
    return step


@given(FACTORS, st.integers(1, 12), st.integers(1, 5), st.sampled_from([-1, 1, 3, 10, 1000]))
def test_against_a_simulation(factor: Any, batches: int, epochs: int, max_steps: int) -> None:
    callback = GradientAccumulation(factor)
    expected = simulate(callback, batches, epochs, max_steps)
    assert count_steps(callback.next_factor, batches, epochs, max_steps) == expected
    assert callback.count_steps(batches, epochs, max_steps) == expected


@pytest.mark.parametrize(
    ("factor", "batches", "epochs", "max_steps"),
    [(3, 7, 2, -1), ({"3step": 2, "0.7fit": 5}, 7, 3, -1), ({"0.5fit": 3}, 5, 3, 8), ({"1.5epoch": 4}, 6, 2, 5)],
)
def test_against_the_trainer(factor: Any, batches: int, epochs: int, max_steps: int) -> None:
    callback = GradientAccumulation(factor)
    trainer = fit(Tiny(), callback, data=loader(batches), max_epochs=epochs, max_steps=max_steps)
    assert callback.count_steps(batches, epochs, max_steps) == trainer.global_step


def test_nothing_to_count() -> None:
    assert count_steps(lambda now: 1, 5, 3, max_steps=0) == 0
    assert count_steps(lambda now: 1, 5, 0) == 0
    assert GradientAccumulation(2).count_steps(5, 3, max_steps=0) == 0
