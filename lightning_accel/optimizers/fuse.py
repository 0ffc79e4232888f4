"""Turn on the fused, else the multi-tensor, step of a torch optimizer, in place."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["sparse_parameters", "use_fused_"]

_FOREACH_SIZE = 2**13  # mean elements a parameter up to which foreach is the faster one on the CPU


def sparse_parameters(module: nn.Module) -> set[Tensor]:
    """The parameters of embeddings with ``sparse=True``, whose gradients a fused step can't take."""
    embeddings = (layer for layer in module.modules() if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)))
    return {layer.weight for layer in embeddings if layer.sparse}


def use_fused_(optimizer: Optimizer, sparse: Collection[Tensor] = ()) -> list[tuple[str, str]]:
    """Turn on ``fused``, else ``foreach``, in each parameter group that can have it, now and after a state is loaded.

    Args:
        optimizer: Any optimizer.
        sparse: Parameters whose gradients will be sparse.

    Returns:
        For each group what was turned on, ``"fused"``, ``"foreach"`` or ``""``, and for the last the reason.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
        >>> use_fused_(optimizer)
        [('fused', '')]
        >>> optimizer.param_groups[0]["fused"]
        True
    """
    result = [_decide(optimizer, group, sparse) for group in optimizer.param_groups]
    changes = [change for change, _ in result]
    if any(changes):
        _apply(optimizer, changes)
        if "fused" in changes:
            optimizer.register_step_pre_hook(_align_layouts)
        # A loaded state brings the options of the run that saved it.
        optimizer.register_load_state_dict_post_hook(functools.partial(_apply, changes=changes))
    return result


def _decide(optimizer: Optimizer, group: dict[str, Any], sparse: Collection[Tensor]) -> tuple[str, str]:
    cls = next(cls for cls in type(optimizer).__mro__ if "step" in vars(cls))
    parameters = group["params"]
    if not cls.__module__.startswith("torch.optim.") or "foreach" not in group:
        return "", f"{type(optimizer).__name__} has no fused step"
    if group.get("fused"):
        return "", "it is fused already"
    if group.get("differentiable"):
        return "", "a differentiable step can't be fused"
    if any(parameter in sparse for parameter in parameters):
        return "", "its gradients are sparse"
    kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
    if "fused" in group and kinds and all(_can_fuse(cls, device, dtype) for device, dtype in kinds):
        return "fused", ""
    if group["foreach"] is not None:
        return "", f"`foreach` was set to {group['foreach']}"
    if isinstance(group["lr"], Tensor) or any(device.type != "cpu" for device, _ in kinds):
        return "", "torch chooses the multi-tensor step by itself where it can"
    if sum(map(torch.numel, parameters)) > _FOREACH_SIZE * len(parameters):
        return "", "the multi-tensor step is slower for large parameters on the CPU"
    return ("foreach", "") if parameters else ("", "it has no parameters")


@functools.cache
def _can_fuse(cls: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the class has a fused step there; found by taking one, since it differs between versions of torch."""
    try:
        weight = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        weight.grad = torch.zeros_like(weight)
        cls([weight], fused=True).step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def _align_layouts(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Give gradients and moments the memory layout of their parameter.

    torch's fused kernels read all of them as one line of memory and are silently wrong where a parameter is
    channels_last and its loaded moments or its gradient are not. Only weights of 4 dimensions and more have such
    layouts.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.dim() < 4:
                continue
            if parameter.grad is not None and _differs(parameter, parameter.grad):
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and _differs(parameter, value):
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _differs(parameter: Tensor, other: Tensor) -> bool:
    return not (parameter.is_contiguous() and other.is_contiguous()) and parameter.stride() != other.stride()


def _apply(optimizer: Optimizer, changes: Sequence[str]) -> None:
    for group, change in zip(optimizer.param_groups, changes, strict=False):
        if change == "fused":
            # `_step_supports_amp_scaling` stays unset: a GradScaler then unscales before the step, as without fusion,
            # and Lightning can still clip gradients.
            group.update(fused=True, foreach=None)
            for parameter in group["params"]:
                step = optimizer.state.get(parameter, {}).get("step")
                if isinstance(step, Tensor):
                    optimizer.state[parameter]["step"] = step.to(parameter.device, torch.float32)
        elif change == "foreach":
            group["foreach"] = True
    if all(change == "fused" for change in changes):  # for groups that are added later
        optimizer.defaults.update(fused=True, foreach=None)
