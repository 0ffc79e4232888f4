"""Bytes of optimizer state, by a step on fake tensors, or on small real ones where the optimizer reads numbers.

Parameters of one group with the same shape and dtype have state of the same size, so one of them is stepped.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_accel.hooks.memory import storage_key
from lightning_accel.hooks.tensors import tensors_in
from lightning_accel.optimizers.torchao_state import TORCHAO_BLOCKS, TorchAOState

__all__ = ["measure_flat_state", "measure_state"]

_BLOCK = max(TORCHAO_BLOCKS.values())
_Made = tuple[Tensor, dict[str, Any]] | None
"""A parameter, and what the optimizer kept of it before any step."""
_STAND_IN = 2**16  # elements of a real parameter that is stepped in place of a large one


def measure_state(optimizer: Optimizer, mode: FakeTensorMode) -> int:
    """Step once, and return the bytes of all tensors in the state.

    Args:
        optimizer: Of fake parameters, without state; it is left so.
        mode: Of the parameters.

    Raises:
        ValueError: If no step tells what it keeps.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS keeps a history of gradients that grows with its steps, which one step does not show")
    # at construction: some can't step without, as Adagrad before torch 2.13
    made = next(((parameter, dict(entries)) for parameter, entries in optimizer.state.items()), None)
    low_bit = getattr(optimizer, "low_bit", None)
    own: dict[Tensor, Any] = getattr(low_bit, "chosen", {})
    chosen, counts = [], Counter[Tensor]()
    for group in optimizer.param_groups:
        first: dict[Any, Tensor] = {}
        for parameter in group["params"]:
            if parameter.requires_grad:
                key = (parameter.shape, parameter.dtype, own.get(parameter))
                counts[first.setdefault(key, parameter)] += 1
        chosen.append(list(first.values()))
    with _groups(optimizer, chosen):
        # tables that the kernels of 8-bit state keep for good must not be fake
        with contextlib.suppress(Exception):  # it looks at values: any library's optimizer may fail in its own way
            if low_bit is None:
                with mode:
                    for parameter in counts:
                        parameter.grad = torch.zeros_like(parameter)
                    optimizer.step()
                return sum(_size(optimizer.state[parameter]) * count for parameter, count in counts.items())
        try:
            return sum(
                count * _by_stand_ins(optimizer, number, parameter, own.get(parameter), made)
                for number, group in enumerate(chosen)
                for parameter, count in ((parameter, counts[parameter]) for parameter in group)
            )
        except Exception as error:
            raise ValueError(
                f"one step of {type(optimizer).__name__} fails ({type(error).__name__}: {error})".splitlines()[0]
            ) from error


def measure_flat_state(optimizer: Optimizer, mode: FakeTensorMode) -> int | None:
    """The same on what ZeRO steps: one flat parameter a group, in fp32; None where that can't be stepped.

    Args:
        optimizer: As of :func:`measure_state`.
        mode: Of the parameters.
    """
    flat = []
    for group in optimizer.param_groups:
        elements = sum(parameter.numel() for parameter in group["params"] if parameter.requires_grad)
        with mode:
            flat.append([nn.Parameter(torch.empty(elements, dtype=torch.float32))] if elements else [])
    try:
        with _groups(optimizer, flat):
            return measure_state(optimizer, mode)
    except ValueError:
        return None


@contextlib.contextmanager
def _groups(optimizer: Optimizer, parameters: Sequence[list[Any]]) -> Iterator[None]:
    """Let the groups have other parameters for a while, and the optimizer forget what it kept of them."""
    before, state = [group["params"] for group in optimizer.param_groups], optimizer.state.copy()
    for group, chosen in zip(optimizer.param_groups, parameters, strict=True):
        group["params"] = chosen
    try:
        yield
    finally:
        for group, chosen, own in zip(optimizer.param_groups, parameters, before, strict=True):
            group["params"] = own
            for parameter in chosen:
                parameter.grad = None
        optimizer.state = state


def _size(entries: Any) -> int:
    storages = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors_in(entries)}
    return sum(storages.values())


def _by_stand_ins(optimizer: Optimizer, number: int, parameter: Tensor, bits: Any, made: _Made) -> int:
    """Step on real parameters of fewer rows, and extend: what is kept of one grows with its rows, or not at all."""
    shape, plan = tuple(parameter.shape), getattr(optimizer, "low_bit", None)
    # two that are both as large as those whose state is in 8 bits, if this one is
    elements = max(_STAND_IN, getattr(plan, "min_size", 0))
    row = max(1, parameter[:1].numel()) if shape else elements
    rows = -(-elements // row)
    if isinstance(optimizer, TorchAOState):  # which codes what is made of whole blocks, as the parameter may be
        rows += -rows % (_BLOCK // math.gcd(_BLOCK, row))
    if not shape or shape[0] <= 2 * rows:
        return _step_real(optimizer, number, shape, parameter.dtype, bits, made)
    small, large = (
        _step_real(optimizer, number, (count, *shape[1:]), parameter.dtype, bits, made) for count in (rows, 2 * rows)
    )
    return round(small + (large - small) * (shape[0] - rows) / rows)


def _like(value: Any, parameter: Tensor, stand_in: Tensor) -> Any:
    """What is kept of one parameter, for another one."""
    if isinstance(value, Mapping):  # coded
        return torch.zeros_like(stand_in)
    if not isinstance(value, Tensor):
        return value
    return torch.zeros(stand_in.shape if value.shape == parameter.shape else value.shape, dtype=value.dtype)


def _step_real(
    optimizer: Optimizer, number: int, shape: tuple[int, ...], dtype: torch.dtype, bits: Any, made: _Made
) -> int:
    stand_in = nn.Parameter(torch.zeros(shape, dtype=dtype))
    stand_in.grad = torch.ones_like(stand_in)
    if bits is not None:
        optimizer.low_bit.chosen[stand_in] = bits  # type: ignore[attr-defined]  # only such optimizers have it
    with _groups(optimizer, [[stand_in] if other == number else [] for other in range(len(optimizer.param_groups))]):
        optimizer.state.clear()
        if made is not None:
            parameter, entries = made
            optimizer.state[stand_in] = {name: _like(value, parameter, stand_in) for name, value in entries.items()}
        step: Callable[[], Any] = optimizer.step
        step()
        return _size(optimizer.state[stand_in])
