"""The tensors that a nested value holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in mappings, lists and tuples, and those that a wrapper such as a quantised one is made of."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a wrapper has no storage of its own
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
