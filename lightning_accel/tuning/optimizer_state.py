"""Bytes of optimizer state, by a step on fake tensors, or on small real ones where the optimizer reads numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_accel.hooks.tensors import tensors_in
from lightning_accel.tuning.activations import storage_key

__all__ = ["measure_state"]

_STAND_IN = 2**16  # elements, more than an 8-bit optimizer leaves in 32 bits


def measure_state(optimizer: Optimizer, mode: FakeTensorMode) -> tuple[int, int]:
    """Step once and count.

    Args:
        optimizer: Of fake parameters, without state; it is not usable afterwards.
        mode: Of the parameters.

    Returns:
        Bytes of all tensors in its state, and what they would be on fp32 copies of the parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        with mode:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            optimizer.step(**_closure(optimizer))
        return _count(optimizer.state)
    except Exception:  # it looks at values: any library's optimizer may fail in its own way
        return _by_stand_ins(optimizer)
    finally:
        for parameter in parameters:
            parameter.grad = None


def _closure(optimizer: Optimizer) -> dict[str, Any]:
    needs = isinstance(optimizer, torch.optim.LBFGS)
    return {"closure": lambda: torch.zeros((), requires_grad=True)} if needs else {}


def _count(state: Mapping[Any, Any]) -> tuple[int, int]:
    actual = master = 0
    seen = set()
    for parameter, entries in state.items():
        dtype = parameter.dtype if isinstance(parameter, Tensor) else None
        for tensor in tensors_in(entries):
            if storage_key(tensor) in seen:
                continue
            seen.add(storage_key(tensor))
            actual += tensor.untyped_storage().nbytes()
            itemsize = 4 if tensor.dtype == dtype and tensor.is_floating_point() else tensor.element_size()
            master += tensor.untyped_storage().nbytes() // tensor.element_size() * itemsize
    return actual, master


def _by_stand_ins(optimizer: Optimizer) -> tuple[int, int]:
    """Step on real parameters of fewer rows, and extend: what an optimizer keeps grows with the rows, or not at all."""
    kept: set[Tensor] = getattr(getattr(optimizer, "low_bit", None), "keep", set())
    groups = [list(group["params"]) for group in optimizer.param_groups]
    known: dict[tuple[Any, ...], tuple[int, int]] = {}
    actual = master = 0
    for number, parameters in enumerate(groups):
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            shape, is_kept = tuple(parameter.shape), parameter in kept
            key = (number, shape, parameter.dtype, is_kept)
            if key not in known:
                rows = -(-_STAND_IN // max(1, parameter[:1].numel())) if shape else 1
                measured = []
                for count in (rows, 2 * rows) if shape and shape[0] > 2 * rows else shape[:1] or (1,):
                    stand_in = nn.Parameter(torch.zeros((count, *shape[1:]) if shape else (), dtype=parameter.dtype))
                    stand_in.grad = torch.ones_like(stand_in)
                    if is_kept:
                        kept.add(stand_in)
                    for other, group in enumerate(optimizer.param_groups):
                        group["params"] = [stand_in] if other == number else []
                    optimizer.state.clear()
                    optimizer.step(**_closure(optimizer))
                    measured.append(_count(optimizer.state))
                if len(measured) == 1:
                    known[key] = measured[0]
                else:
                    more = (shape[0] - rows) / rows
                    (small, small_master), (large, large_master) = measured
                    known[key] = (
                        round(small + (large - small) * more),
                        round(small_master + (large_master - small_master) * more),
                    )
            actual, master = actual + known[key][0], master + known[key][1]
    return actual, master
