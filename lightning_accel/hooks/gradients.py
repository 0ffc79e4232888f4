"""The gradients that an optimizer is about to use: to scale, leave out, or measure them, to see inf and NaN in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "drop_gradients_",
    "gradients_are_finite",
    "gradients_of",
    "part_of_square",
    "scale_gradients_",
    "squared_norm",
]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Every gradient that an optimizer is about to use."""
    return [parameter.grad for parameter in _parameters(optimizer)]  # type: ignore[misc]  # none of them is None


def scale_gradients_(optimizer: Optimizer, scale: float) -> None:
    """Multiply every gradient by ``scale``, in place."""
    for parameter in _parameters(optimizer):
        parameter.grad.mul_(scale)  # type: ignore[union-attr]  # `_parameters` leaves out those without


def drop_gradients_(optimizer: Optimizer) -> None:
    """Take the gradients away: an optimizer passes over such parameters, with their momentum and weight decay."""
    for parameter in _parameters(optimizer):
        parameter.grad = None


def gradients_are_finite(optimizer: Optimizer) -> bool:
    """Whether this rank's part of the gradients holds neither inf nor NaN; waits for the device."""
    sums: dict[torch.device, list[Tensor]] = {}
    for parameter in _parameters(optimizer):
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        gradient = getattr(gradient, "_local_tensor", gradient)  # of a DTensor
        values = gradient._values() if gradient.is_sparse else gradient
        # A sum is one pass without memory, and inf and NaN stay in it; in float32 at least, or it overflows
        wide = torch.promote_types(values.dtype, torch.float32)
        sums.setdefault(values.device, []).append(values.sum(dtype=wide))
    return all(bool(torch.stack(found).sum().isfinite()) for found in sums.values())


def squared_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all numbers in some gradients, or in this rank's part of them, in one pass.

    Args:
        gradients: Of any dtypes; norms are taken in float32 at least, and summed in float64 where the device has it.

    Returns:
        No dimensions; on the device of the first. It does not wait for the device.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        local: Any = getattr(gradient, "_local_tensor", gradient)  # of a DTensor
        local = local.coalesce().values() if local.is_sparse else local
        groups.setdefault((local.device, local.dtype), []).append(local.detach())
    total: Tensor | None = None
    for (_, dtype), values in groups.items():
        wide = torch.promote_types(dtype, torch.float32)
        norms = torch.stack(list(torch._foreach_norm(values, 2, dtype=wide)))
        square = (norms if norms.is_mps else norms.double()).square().sum()  # MPS has no float64
        total = square if total is None else total + square.to(total.device)
    return torch.zeros((), dtype=torch.float64) if total is None else total


def part_of_square(gradients: Iterable[Tensor], ranks: int) -> Tensor:
    """This rank's part of the squared norm of reduced gradients: the sum over all ranks is the whole.

    Args:
        gradients: Which every rank has, whole or in shards.
        ranks: How many ranks there are.
    """
    shares: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        copies, sharded = ranks, cast(Any, gradient)  # every rank has it whole, or some have the same shard of it
        if hasattr(gradient, "placements"):
            sizes = sharded.device_mesh.shape
            copies = math.prod(
                size for size, kind in zip(sizes, sharded.placements, strict=True) if kind.is_replicate()
            )
        shares.setdefault(copies, []).append(gradient)
    parts = [squared_norm(items) / copies for copies, items in shares.items()]
    return sum(parts[1:], parts[0]) if parts else torch.zeros((), dtype=torch.float64)
