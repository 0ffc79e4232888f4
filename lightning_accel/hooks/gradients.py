"""The gradients that an optimizer is about to use: to scale them, to leave them out, to see inf and NaN in them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["drop_gradients_", "gradients_are_finite", "scale_gradients_"]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter


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
