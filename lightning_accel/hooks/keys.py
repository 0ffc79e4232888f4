"""Finding and replacing one item of a batch of any structure, without changing the caller's objects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["find_item", "replace_item"]


def find_item(batch: Any, key: int | str, argument: str) -> Any:
    """The item ``key`` of ``batch``.

    Args:
        batch: A tuple, list, named tuple, mapping, dataclass or object with attributes, or these inside one another.
        key: An index, a key or an attribute; ``"inputs.pixels"`` is ``pixels`` of ``inputs``.
        argument: The name of the argument that ``key`` came from, for the error.

    Raises:
        ValueError: If the batch has no such item; the error says what it has.
    """
    item = batch
    for step in _steps(batch, key):
        try:
            item = _get(item, step)
        except (KeyError, IndexError, AttributeError, TypeError):
            raise ValueError(
                f"Expected `{argument}` to name an item of the batch, which {_describe(item)}, but got {key!r}."
            ) from None
    return item


def replace_item(batch: Any, key: int | str, value: Any) -> Any:
    """A copy of ``batch`` with ``value`` at ``key``; its other items are the same objects."""

    def replace(item: Any, steps: list[int | str]) -> Any:
        if not steps:
            return value
        step, rest = steps[0], steps[1:]
        new = replace(_get(item, step), rest) if rest else value
        if isinstance(item, tuple):
            named: Any = item
            items = list(item)
            items[step if isinstance(step, int) else named._fields.index(step)] = new
            return named._make(items) if hasattr(named, "_make") else tuple(items)
        changed = copy.copy(item)
        if isinstance(item, (list, Mapping)):
            changed[step] = new
        else:
            object.__setattr__(changed, str(step), new)  # also for a frozen dataclass
        return changed

    return replace(batch, _steps(batch, key))


def _steps(batch: Any, key: int | str) -> list[int | str]:
    if isinstance(key, int) or (isinstance(batch, Mapping) and key in batch):
        return [key]
    return [int(step) if step.lstrip("-").isdigit() else step for step in key.split(".")]


def _get(item: Any, step: int | str) -> Any:
    if isinstance(item, Mapping):
        return item[step]
    if isinstance(item, (tuple, list)) and isinstance(step, int):
        return item[step]
    return getattr(item, str(step))


def _describe(item: Any) -> str:
    if isinstance(item, Mapping):
        return f"has the keys {', '.join(map(repr, item))}"
    fields = getattr(item, "_fields", ())
    if dataclasses.is_dataclass(item):
        fields = [field.name for field in dataclasses.fields(item)]
    if fields:
        return f"is a {type(item).__name__} with {', '.join(map(repr, fields))}"
    if isinstance(item, (tuple, list)):
        return f"is a {type(item).__name__} of {len(item)} items"
    return f"is a {type(item).__name__}"
