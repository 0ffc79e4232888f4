"""A fit that is saved and restored: the states of all ranks; which checkpoint is loaded, and when that is done."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_accel.hooks.callback import AccelCallback

__all__ = ["gather_states", "on_resume_end", "on_resume_start"]


def gather_states(trainer: Trainer, state: Any) -> list[Any]:
    """The states of all ranks, on rank 0; elsewhere, and on an exception, only this one's: the others may never come.

    Args:
        trainer: The Trainer, which saves a checkpoint on all ranks.
        state: That of this rank.
    """
    if trainer.world_size == 1 or trainer.interrupted or not torch.distributed.is_initialized():
        return [state]
    states: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(state, states, dst=0)
    return [state] if states is None else states


def on_resume_start(callback: AccelCallback, trainer: Trainer, choose: Callable[[Any], Any]) -> None:
    """Let ``choose`` decide, in this fit, which checkpoint is loaded.

    It runs on every rank, once all callbacks are set up and the ranks are connected: before the strategy's setup, or
    after it under strategies that load checkpoints late (DeepSpeed, FSDP2).

    Args:
        callback: Whose change this is.
        trainer: The Trainer of the fit.
        choose: From the path that the fit was given (``None`` or empty where none was) to the one to load, or ``None``.
    """
    callback.patch(trainer._checkpoint_connector, "resume_start", partial(_resume_start, choose=choose))


def _resume_start(
    original: Callable[..., None],
    checkpoint_path: Any = None,
    *args: Any,
    choose: Callable[[Any], Any],
    **kwargs: Any,
) -> None:
    original(choose(checkpoint_path), *args, **kwargs)


def on_resume_end(callback: AccelCallback, trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` in this fit when everything that a checkpoint has is restored, under every strategy.

    Some restore callbacks after ``on_fit_start`` (DeepSpeed), and all restore the loops after it.

    Args:
        callback: Whose change this is.
        trainer: The Trainer of the fit.
        function: Called also where the fit was given no checkpoint.
    """

    def resume_end(original: Callable[[], None]) -> None:
        original()
        function()

    callback.patch(trainer._checkpoint_connector, "resume_end", resume_end)
