from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import torch

from lightning_accel.hooks.rng import get_rng_state, preserved_rng, set_rng_state


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(1).item(),
        torch.randn(1).item(),
    ]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_same_numbers_come_again() -> None:
    draw()  # an odd number of Gaussians: Python and NumPy now hold a spare one
    state = through_a_file(get_rng_state())
    expected = draw() + draw()
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    draw()
    set_rng_state(state)
    assert draw() + draw() == expected


def test_reading_draws_nothing() -> None:
    state = get_rng_state()
    expected = draw()
    set_rng_state(state)
    get_rng_state()
    assert draw() == expected


def test_preserved_rng_hides_what_is_drawn_inside() -> None:
    state = get_rng_state()
    expected = draw()
    set_rng_state(state)
    with preserved_rng():
        draw()
    assert draw() == expected


def test_a_state_without_numpy_leaves_numpy_alone() -> None:
    state = {name: value for name, value in get_rng_state().items() if name != "numpy"}
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    set_rng_state(state)
    assert np.random.rand() == expected


def test_devices_that_are_gone_are_left_out() -> None:
    state = {**get_rng_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)}
    if not torch.cuda.is_available():
        set_rng_state(state)
