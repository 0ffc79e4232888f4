"""Optimizers of ``schedulefree`` in the place of torch's, and the way from what they train to its average and back.

Gradients are taken at y, between the iterate z that the base optimizer steps and the average x of all z:
``y = (1 - b) z + b x`` with the momentum b ("The Road Less Scheduled", Defazio et al. 2024,
https://arxiv.org/abs/2405.15682). The parameters are y, and the state has z. The package finds x by interpolation, and
y again by another, which loses its last bits; here y is kept beside x in the optimizer's state, under the name ``y``,
and put back. What else the state and its groups say is as the package has it: ``train_mode`` is False where the
parameters are x.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.errors import require
from lightning_accel.optimizers.low_bit_plan import retype_

__all__ = ["momentum_of", "to_average_", "to_training_", "use_schedule_free_"]

_COUNTERPARTS: dict[type[Optimizer], str] = {
    torch.optim.AdamW: "AdamWScheduleFree",
    torch.optim.Adam: "AdamWScheduleFree",
    torch.optim.RAdam: "RAdamScheduleFree",
    torch.optim.SGD: "SGDScheduleFree",
}
_WITHOUT_FORM = ("amsgrad", "maximize", "differentiable", "dampening")


def use_schedule_free_(
    optimizer: Optimizer,
    momentum: float | None = None,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    warn: Callable[[str], Any] = warnings.warn,
) -> Optimizer:
    """Make an optimizer the schedule-free one of its kind, in place, before its first step.

    Groups keep their rates, decay, ``eps`` and second beta.

    Args:
        optimizer: ``torch.optim.AdamW``, ``Adam``, ``RAdam`` or ``SGD``.
        momentum: As of :class:`ScheduleFree`.
        warmup_steps: As of :class:`ScheduleFree`.
        r: As of :class:`ScheduleFree`.
        weight_lr_power: As of :class:`ScheduleFree`.
        warn: Told when the loaded state of an optimizer with a schedule had to be converted.

    Returns:
        The same object, ready to train.

    Raises:
        ImportError: If ``schedulefree`` is not installed.
        ValueError: If it has no schedule-free counterpart.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = use_schedule_free_(torch.optim.SGD([weight], lr=0.5), momentum=0.9)
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> to_average_(optimizer)
        >>> weight.data
        tensor([0.5000, 0.5000])
    """
    package = require("schedulefree", "schedulefree", "ScheduleFree")
    if reason := _refusal(optimizer, warmup_steps):
        raise ValueError(f"Expected an optimizer that has a schedule-free counterpart, but {reason}.")
    cls = getattr(package, _COUNTERPARTS[type(optimizer)])
    options: dict[str, Any] = {"r": r, "weight_lr_power": weight_lr_power}
    if warmup_steps:
        options["warmup_steps"] = warmup_steps
    groups = [_group(optimizer, group, momentum) for group in optimizer.param_groups]
    template = cls(groups, **options)
    template.defaults["train_mode"] = True  # also of groups that are added later
    for group, new in zip(optimizer.param_groups, template.param_groups, strict=True):
        group.clear()
        group.update(new, train_mode=True)
    vars(optimizer).pop("_step_supports_amp_scaling", None)  # of a fused step: this one unscales nothing
    retype_(optimizer, cls, defaults=template.defaults)
    optimizer.register_load_state_dict_pre_hook(functools.partial(_convert, warn=warn))
    return optimizer


def _refusal(optimizer: Optimizer, warmup_steps: int) -> str:
    """Why an optimizer can't be made schedule-free, with the way out, or an empty string."""
    name = type(optimizer).__name__
    if type(optimizer) not in _COUNTERPARTS:
        return f"{name} has none: use AdamW, Adam, RAdam or SGD of torch.optim"
    if optimizer.state:
        return f"this {name} has made steps already: make it schedule-free before"
    if warmup_steps and isinstance(optimizer, torch.optim.RAdam):
        return "RAdam's has no warm-up, and needs none: leave `warmup_steps` at 0"
    for group in optimizer.param_groups:
        for option in _WITHOUT_FORM:
            if group.get(option):
                return f"that of {name} has no `{option}`: leave it out"
        decoupled = isinstance(optimizer, (torch.optim.AdamW, torch.optim.SGD)) or group.get("decoupled_weight_decay")
        if group["weight_decay"] and not decoupled:
            way_out = "AdamW" if isinstance(optimizer, torch.optim.Adam) else "decoupled_weight_decay=True"
            return f"that of {name} decays weights and not by the gradient: use {way_out}, or weight_decay=0"
    return ""


def _group(optimizer: Optimizer, group: dict[str, Any], momentum: float | None) -> dict[str, Any]:
    """A parameter group in terms of the schedule-free optimizer, with the keys that others put there."""
    # A scheduler that cycles the momentum has done so already
    source = optimizer.defaults if "max_momentum" in group else group
    own = source["betas"][0] if "betas" in source else source["momentum"]
    momentum = momentum or own or 0.9
    new = {name: value for name, value in group.items() if name not in optimizer.defaults}
    new |= {name: group[name] for name in ("weight_decay", "eps") if name in group}
    new |= {"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum}
    if group.get("foreach") is False:
        new["foreach"] = False
    return {**new, "lr": float(group["lr"])}


def momentum_of(group: dict[str, Any]) -> float:
    """How near to the average the gradients of a group are taken."""
    momentum: float = group["betas"][0] if "betas" in group else group["momentum"]
    return momentum


def _averaged(optimizer: Optimizer, group: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The parameters of a group that were stepped, and their state."""
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        if "z" in state:
            yield parameter, state


@torch.no_grad()
def to_average_(optimizer: Optimizer) -> None:
    """Put the average x into the parameters, and keep y beside it; does nothing where it is there."""
    for group in optimizer.param_groups:
        if group["train_mode"]:
            for parameter, state in _averaged(optimizer, group):
                state["y"] = parameter.detach().clone()
                parameter.lerp_(end=state["z"], weight=1 - 1 / momentum_of(group))
            group["train_mode"] = False


@torch.no_grad()
def to_training_(optimizer: Optimizer) -> None:
    """Put y back, exactly; from the state of the package alone, in evaluation mode, by its interpolation."""
    for group in optimizer.param_groups:
        for parameter, state in _averaged(optimizer, group):
            y = state.pop("y", None)
            if not group["train_mode"]:
                parameter.lerp_(end=state["z"], weight=1 - momentum_of(group)) if y is None else parameter.copy_(y)
        group["train_mode"] = True


def _convert(optimizer: Optimizer, state_dict: dict[str, Any], warn: Callable[[str], Any]) -> dict[str, Any] | None:
    """The state of an optimizer with a schedule, for the schedule-free one: the average begins at its weights.

    What Adam knows of the gradients' size is kept, with its count of steps. Rates that no scheduler changes are those
    that are configured now.
    """
    saved = state_dict["param_groups"]
    if all("weight_sum" in group for group in saved) or len(saved) != len(optimizer.param_groups):
        return None  # torch tells where the groups do not fit
    state, groups = {}, []
    for group, old in zip(optimizer.param_groups, saved, strict=True):
        steps = 0
        for parameter, number in zip(group["params"], old["params"], strict=False):
            entries = state_dict["state"].get(number, {})
            squares = entries.get("exp_avg_sq")
            if "betas" in group and isinstance(squares, Tensor):
                state[number] = {"z": parameter.detach().clone(), "exp_avg_sq": squares}
                steps = max(steps, int(entries["step"]))
        rate = old["lr"] if "initial_lr" in group else group["lr"]  # a scheduler goes on from its last one
        groups.append({**group, "params": old["params"], "lr": rate, "k": steps})
    kept = "its second moments and count of steps go on" if state else "nothing of it is used"
    warn(
        f"The checkpoint's optimizer was not schedule-free: the average begins at the checkpoint's weights, and {kept}."
    )
    return {**state_dict, "state": state, "param_groups": groups}
