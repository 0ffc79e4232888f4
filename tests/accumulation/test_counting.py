"""What counts in a batch, and the factor nearest to a target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_accel.accumulation.counting import count_batch, count_samples, count_tokens, nearest_factor

LABELS = torch.tensor([[5, 2, -100], [7, -100, -100]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        (LABELS, {}, 3),
        (LABELS, {"ignore_index": 7}, 5),
        (LABELS.flatten(), {}, 3),
        (MASK, {"mask": True}, 3),
        (MASK, {"ignore_index": 0}, 3),
        (MASK, {}, 6),  # read as targets: none of them is -100
        (MASK.bool(), {}, 3),
        (MASK.bool(), {"ignore_index": 1}, 3),
        (torch.tensor([0.5, 1.0, 0.0]), {}, 1.5),
        (torch.tensor(17), {}, 17),
        (17, {}, 17),
        (2.5, {}, 2.5),
        (torch.full((2, 3), -100), {}, 0),
        (torch.zeros(0, 3, dtype=torch.int64), {}, 0),
    ],
)
def test_count_tokens(value: Any, options: dict[str, Any], expected: float) -> None:
    found = count_tokens(value, **options)
    assert found.ndim == 0
    assert found.item() == expected


@pytest.mark.parametrize("value", ["three", None, [1, 2], True])
def test_what_has_no_tokens(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^Expected `count_key` to name a tensor or a number in the batch, but got "):
        count_tokens(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(4, 3), 4),
        ([torch.zeros(5, 3), torch.zeros(4)], 5),
        ({"id": torch.tensor(1), "x": [{"y": torch.zeros(3)}]}, 3),
        (6, 6),
        (torch.tensor(6), 6),
        ((torch.zeros(2, 3), "names"), 2),
    ],
)
def test_count_samples(value: Any, expected: int) -> None:
    assert int(count_samples(value)) == expected


@pytest.mark.parametrize("value", ["text", {}, [1, 2], None])
def test_what_has_no_samples(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^Expected `count_key` to name the item of the batch .*, but got None\.$"):
        count_samples(value)


@pytest.mark.parametrize(
    ("batch", "unit", "key", "expected"),
    [
        ({"inputs": {"attention_mask": MASK}}, "tokens", "inputs.attention_mask", 3),
        ({"attention_mask": MASK}, "tokens", "attention_mask", 3),
        ({"inputs": {"attention_mask": MASK}}, "samples", "inputs.attention_mask", 2),
        ((torch.zeros(2, 3), LABELS), "tokens", 1, 3),
        ((torch.zeros(2, 3), LABELS), "tokens", "1", 3),
        ({"n": 12, "x": MASK}, "tokens", "n", 12),
        ({"n": 12, "x": MASK}, "samples", "n", 12),
        ({"n": 12, "x": MASK}, "samples", None, 2),
    ],
)
def test_count_batch(batch: Any, unit: Any, key: Any, expected: int) -> None:
    assert int(count_batch(batch, unit, key)) == expected


@given(st.integers(1, 300), st.integers(1, 60))
def test_no_other_factor_is_nearer(target: int, batch: int) -> None:
    found = nearest_factor(target, batch)
    assert found >= 1
    assert all(abs(found * batch - target) <= abs(other * batch - target) for other in range(1, 305))
