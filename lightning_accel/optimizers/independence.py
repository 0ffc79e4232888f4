"""Whether an optimizer steps each parameter by itself, so that parameters may be stepped at different times.

The step of one parameter is that of the optimizer's own class on a view of it, in which the parameter is alone in its
group. A class that torch did not write is tried on a few numbers: together, and one after another.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_accel.optimizers.low_bit_plan import view_of, without_hooks

__all__ = ["step_alone", "why_not_alone"]

_STEPS = 3
_SIZE = 2
"""Elements a dimension, at most, of what a class is tried on."""


def step_alone(optimizer: Optimizer, cls: type[Optimizer], group: Mapping[str, Any], parameter: Tensor) -> None:
    """Step one parameter as ``cls`` does; what the step changes in the group or in attributes is left to the others.

    Args:
        optimizer: Whose state is used.
        cls: Its class, or a base class of that.
        group: The parameter's group.
        parameter: Its gradient is there.
    """
    without_hooks(cls.step)(view_of(optimizer, cls, [{**group, "params": [parameter]}]))


def why_not_alone(optimizer: Optimizer) -> str:
    """Why the parameters of an optimizer can't be stepped one at a time, or an empty string.

    Example:
        >>> why_not_alone(torch.optim.LBFGS([torch.zeros(2)]))
        'LBFGS steps along a line through all parameters at once'
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        return f"{name} steps along a line through all parameters at once"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return f"{name}(differentiable=True) keeps its steps in the autograd graph, which the backward pass frees"
    if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return f"`step` of this {name} object was replaced by something else"
    step = next(cls for cls in type(optimizer).__mro__ if "step" in vars(cls))
    if step.__module__.startswith("torch.optim."):
        return ""
    try:
        with torch.random.fork_rng():
            alike = _same_alone(optimizer)
    except Exception as error:
        return f"{name} could not be tried on single parameters ({type(error).__name__}: {error})"
    return "" if alike else f"{name} does something else when it steps one parameter at a time"


def _same_alone(optimizer: Optimizer) -> bool:
    """Whether small copies of an optimizer come to the same weights, bit for bit, in both ways."""
    together, alone = _small_copy(optimizer), _small_copy(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        pairs = [list(zip(*pair, strict=True)) for pair in zip(_parameters(together), _parameters(alone), strict=True)]
        for one, other in (pair for group in pairs for pair in group):
            one.grad = torch.randn(one.shape, generator=generator).to(one)
            other.grad = one.grad.clone()
        without_hooks(type(together).step)(together)
        for group, small in zip(reversed(alone.param_groups), reversed(pairs), strict=True):  # as a backward pass does
            for _, parameter in reversed(small):
                step_alone(alone, type(alone), group, parameter)
                parameter.grad = None
        without_hooks(type(alone).step)(alone)
        if any(not torch.equal(one, other) for group in pairs for one, other in group):
            return False
    return _alike(_kept(together), _kept(alone))


def _kept(optimizer: Optimizer) -> list[Any]:
    """What an optimizer has beside its parameters: their state, and the options of its groups."""
    states = [optimizer.state.get(parameter) for group in _parameters(optimizer) for parameter in group]
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return [states, groups]


def _alike(one: Any, other: Any) -> bool:
    pairs = list(zip_longest(tree_leaves(one), tree_leaves(other)))
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


def _parameters(optimizer: Optimizer) -> list[list[Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def _small_copy(optimizer: Optimizer) -> Any:
    """An optimizer of the same class and settings, at its start, with a few small parameters in the place of each."""
    generator = torch.Generator().manual_seed(1)
    small = {}
    for parameter in (parameter for group in _parameters(optimizer) for parameter in group):
        shape = [min(size, _SIZE) for size in parameter.shape]
        values = torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)
        small[id(parameter)] = torch.nn.Parameter(values, parameter.requires_grad)
    groups = []
    for group in optimizer.param_groups:
        own = {**group, "params": [small[id(parameter)] for parameter in group["params"]]}
        if not float(own.get("lr", 1)):  # of a schedule that starts at 0, where nothing would move
            own["lr"] = group.get("initial_lr") or 1e-2
        groups.append(own)
    skipped = {"param_groups", "state", "step"}
    rest = {name: value for name, value in vars(optimizer).items() if name not in skipped and "_hooks" not in name}
    memo: dict[int, Any] = dict(small)
    view = view_of(optimizer, type(optimizer), copy.deepcopy(groups, {id(item): item for item in small.values()}))
    vars(view).update(copy.deepcopy(rest, memo), state=defaultdict(dict))
    vars(view).update({name: OrderedDict() for name in vars(optimizer) if "_hooks" in name})
    vars(view).pop("step", None)
    if hasattr(view, "train"):  # of a schedule-free one
        view.train()
    return view
