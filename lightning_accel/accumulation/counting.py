"""How many samples or tokens a batch has, and how many batches are nearest to a number of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_accel.hooks.keys import find_item
from lightning_accel.hooks.tensors import tensors_in

__all__ = ["Counted", "count_batch", "count_samples", "count_tokens", "nearest_factor"]

Counted = Literal["samples", "tokens"]


def count_tokens(value: Any, ignore_index: int = -100, *, mask: bool = False) -> Tensor:
    """How many tokens count, as a tensor without dimensions on the device of ``value``.

    Args:
        value: A number, or a tensor without dimensions: the count itself. Booleans: a mask, of which True counts.
            Floats: weights, whose sum is the count. Integers: targets; those that are not ``ignore_index`` count.
        ignore_index: The target that does not count.
        mask: Whether integers are a mask, of which those count that are not 0.

    Raises:
        TypeError: If it is neither a number nor a tensor.

    Example:
        >>> int(count_tokens(torch.tensor([[5, 2, -100], [7, -100, -100]])))
        3
        >>> int(count_tokens(torch.tensor([[1, 1, 0], [1, 0, 0]]), mask=True))
        3
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `count_key` to name a tensor or a number in the batch, but got {value!r}.")
    entries = value.detach()
    if entries.ndim == 0:
        return entries
    if entries.dtype == torch.bool or entries.is_floating_point():
        return entries.sum()
    return torch.ne(entries, 0 if mask else ignore_index).sum()


def count_samples(value: Any) -> Tensor:
    """The number of samples: a number itself, or the length of the first dimension of a tensor, or of the first tensor.

    Args:
        value: A number, a tensor, or a batch that has tensors somewhere in it.

    Raises:
        ValueError: If there is no tensor in it.

    Example:
        >>> int(count_samples({"x": torch.zeros(4, 3)}))
        4
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value)
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.detach()
    for tensor in tensors_in(value):
        if tensor.ndim:
            return torch.tensor(len(tensor))
    raise ValueError(
        "Expected `count_key` to name the item of the batch whose length is the number of samples, since no tensor is "
        f"found in this {type(value).__name__}, but got None."
    )


def count_batch(batch: Any, unit: Counted, key: str | int | None = None, ignore_index: int = -100) -> Tensor:
    """How many samples or tokens a batch has.

    Args:
        batch: A batch of any structure.
        unit: What is counted.
        key: The item with the mask, the targets or the count: a key, an index, or a path such as
            ``"inputs.attention_mask"``. A key that ends in "mask" names a mask. None, for samples: the first tensor.
        ignore_index: The target that does not count.

    Raises:
        ValueError: If the batch has no such item; the error says what it has.

    Example:
        >>> batch = {"inputs": {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}}
        >>> int(count_batch(batch, "tokens", "inputs.attention_mask"))
        3
        >>> int(count_batch(batch, "samples"))
        2
    """
    item = batch if key is None else find_item(batch, key, "count_key")
    if unit == "samples":
        return count_samples(item)
    return count_tokens(item, ignore_index, mask=str(key).endswith("mask"))


def nearest_factor(target: int, batch: int) -> int:
    """How many batches of ``batch`` come nearest to ``target``; at least one, and the more of two that are as near.

    Example:
        >>> nearest_factor(256, 32), nearest_factor(100, 32)
        (8, 3)
    """
    return max(1, (2 * target + batch) // (2 * batch))
