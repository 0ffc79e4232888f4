from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from lightning_accel.hooks.keys import find_item, replace_item


class Pair(NamedTuple):
    x: int
    y: int


@dataclass(frozen=True)
class Frozen:
    x: int
    y: int


@dataclass(slots=True)
class Slotted:
    x: int
    y: int

    def __post_init__(self) -> None:
        assert self.x != "new", "made anew"


CASES: list[tuple[Any, int | str, Any, Any]] = [
    ((1, 2), 1, 2, (1, "new")),
    ((1, 2, 3), -3, 1, ("new", 2, 3)),
    ([1, 2], 0, 1, ["new", 2]),
    (Pair(1, 2), 1, 2, Pair(1, "new")),
    (Pair(1, 2), "y", 2, Pair(1, "new")),
    ({"x": 1, "y": 2}, "y", 2, {"x": 1, "y": "new"}),
    ({0: 1, "y": 2}, 0, 1, {0: "new", "y": 2}),
    ({"a.b": 1, "a": {"b": 2}}, "a.b", 1, {"a.b": "new", "a": {"b": 2}}),
    (OrderedDict(x=1), "x", 1, OrderedDict(x="new")),
    (UserDict(x=1), "x", 1, UserDict(x="new")),
    (Frozen(1, 2), "x", 1, Frozen("new", 2)),
    (SimpleNamespace(x=1, y=2), "y", 2, SimpleNamespace(x=1, y="new")),
    (
        {"inputs": {"pixels": 1, "mask": 2}, "y": 3},
        "inputs.pixels",
        1,
        {"inputs": {"pixels": "new", "mask": 2}, "y": 3},
    ),
    (({"x": 1}, 2), "0.x", 1, ({"x": "new"}, 2)),
    ([Pair(1, 2)], "0.y", 2, [Pair(1, "new")]),
    ({"inputs": [(1, 2)]}, "inputs.0.1", 2, {"inputs": [(1, "new")]}),
]


@pytest.mark.parametrize(("batch", "key", "value", "expected"), CASES)
def test_finds_and_replaces(batch: Any, key: int | str, value: Any, expected: Any) -> None:
    before = repr(batch)
    assert find_item(batch, key, "key") == value
    new = replace_item(batch, key, "new")
    assert new == expected
    assert type(new) is type(expected)
    assert repr(batch) == before


def test_a_dataclass_is_not_made_anew() -> None:
    batch = Slotted(1, 2)
    new = replace_item(batch, "x", "new")
    assert (new.x, new.y, batch.x) == ("new", 2, 1)


def test_other_items_are_the_same_objects() -> None:
    batch = {"x": [1], "y": [2]}
    assert replace_item(batch, "x", 0)["y"] is batch["y"]


@pytest.mark.parametrize(
    ("batch", "key", "message"),
    [
        (
            {"image": 1, "label": 2},
            0,
            "Expected `k` to name an item of the batch, which has the keys 'image', 'label', but got 0.",
        ),
        ({"image": {"x": 1}}, "image.y", "which has the keys 'x', but got 'image.y'."),
        ((1, 2), 2, "which is a tuple of 2 items, but got 2."),
        ([1], "x", "which is a list of 1 items, but got 'x'."),
        (Pair(1, 2), "z", "which is a Pair with 'x', 'y', but got 'z'."),
        (Frozen(1, 2), 0, "which is a Frozen with 'x', 'y', but got 0."),
        (7, "x", "which is a int, but got 'x'."),
    ],
)
def test_a_missing_item_says_what_there_is(batch: Any, key: int | str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_item(batch, key, "k")
    assert message in str(caught.value)
