"""The tensors that a nested value holds, and means of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["tensors_in", "weighted_mean"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in mappings, lists, tuples and dataclasses, and those that a wrapper is made of.

    A wrapper is a tensor without memory of its own, such as a quantised one.
    """
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
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of tensors of one shape, taken in float32 at least; one tensor is returned as it is.

    Example:
        >>> weighted_mean([torch.tensor(1.0), torch.tensor(4.0)], [2, 1])
        tensor(2.)
    """
    first = values[0]
    if len(values) == 1:
        return first
    wide = torch.promote_types(first.dtype, torch.float32)
    total: Any = sum(value.to(wide) * weight for value, weight in zip(values, weights, strict=True))
    mean: Tensor = total / sum(weights)
    return mean.to(first.dtype) if first.is_floating_point() else mean
