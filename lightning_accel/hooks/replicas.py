"""Replicas without DDP's wrapper, whose buckets hold all gradients all the time, for who reduces them otherwise."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.utils import _verify_param_shape_across_processes

from lightning_accel.hooks.callback import AccelCallback

__all__ = ["leave_unwrapped"]

_AT_ONCE = 25 * 2**20
"""About how many bytes are sent as one."""


def leave_unwrapped(callback: AccelCallback, trainer: Trainer) -> Any:
    """Keep Lightning's DDPStrategy from wrapping the module in this fit, and do what the wrapper does but reducing.

    Weights and buffers begin as those of rank 0, and buffers are made so again before each step.

    Args:
        callback: Who reduces the gradients.
        trainer: Of a ``DDPStrategy``.

    Returns:
        The process group, ``None`` for all ranks.

    Raises:
        MisconfigurationException: If the strategy was told to reduce in another way.
    """
    strategy: Any = trainer.strategy
    options = strategy._ddp_kwargs
    given = {"ddp_comm_hook": strategy._ddp_comm_hook, "ddp_comm_state": strategy._ddp_comm_state}
    given["mixed_precision"] = options.get("mixed_precision")
    for name, value in given.items():
        if value is not None:
            raise MisconfigurationException(
                f"{type(callback).__name__} can't work with `{name}` of {type(strategy).__name__}, since it reduces "
                "gradients itself: remove one of them."
            )
    group = options.get("process_group")
    syncs = options.get("forward_sync_buffers", options.get("broadcast_buffers", True))

    def setup_model(original: Any, module: nn.Module) -> nn.Module:
        parameters: list[Tensor] = list(module.parameters())
        ranks: Any = group or dist.group.WORLD
        _verify_param_shape_across_processes(ranks, parameters)
        _take_from_first([*parameters, *(module.buffers() if syncs else ())], group)
        return module

    def with_buffers(original: Any, *args: Any, **kwargs: Any) -> Any:
        if syncs:
            _take_from_first(list(strategy.lightning_module.buffers()), group)
        return original(*args, **kwargs)

    callback.patch(strategy, "_setup_model", setup_model)
    callback.patch(strategy, "_register_ddp_hooks", lambda original: None)
    for name in ("training_step", "validation_step"):
        callback.patch(strategy, name, with_buffers)
    return group


def _take_from_first(tensors: list[Tensor], group: Any) -> None:
    """Give every rank the values of the first one."""
    if tensors:
        ranks: Any = group or dist.group.WORLD
        dist._broadcast_coalesced(ranks, [tensor.detach() for tensor in tensors], _AT_ONCE, 0)  # type: ignore[attr-defined]  # as DDP does
