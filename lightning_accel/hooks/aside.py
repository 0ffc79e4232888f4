"""Training batches run forward on the side, at any moment of a fit, without a trace."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import RunningStage

from lightning_accel.hooks.callback import AccelCallback, trainer_callbacks
from lightning_accel.hooks.data import train_loaders
from lightning_accel.hooks.rng import get_rng_state, set_rng_state
from lightning_accel.hooks.snapshot import Snapshot
from lightning_accel.hooks.trial import loader_parts, training_batches

__all__ = ["forward_aside"]


@contextmanager
def forward_aside(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[Iterator[None]]:
    """Give an iterator that runs one ``training_step`` without gradients each time it is asked, ``count`` times.

    In the block every layer is in the mode in which it is trained. At its end buffers, metrics, modes, random numbers,
    the position in the data and the state of this package's callbacks are as they were; parameters are left alone.
    Nothing is logged. It is for automatic optimization: a module that steps by itself would do so here.
    """
    loaders, strategy = train_loaders(trainer), trainer.strategy
    callbacks = [callback for callback in trainer_callbacks(trainer) if isinstance(callback, AccelCallback)]
    plans = [callback.plan for callback in callbacks]
    parts, datasets = loader_parts(loaders)
    _reshard(strategy.model)
    optimizers = [*strategy.optimizers, *strategy._lightning_optimizers]
    snapshot = Snapshot(
        [pl_module, *callbacks, *parts],
        surfaces=[trainer],
        left=[*plans, *datasets, *optimizers, *pl_module.parameters()],
    )
    random_state, stage = get_rng_state(), trainer.state.stage
    try:
        if trainer.validating:
            trainer.fit_loop.epoch_loop.val_loop._module_mode.restore(pl_module)
        trainer.state.stage = RunningStage.TRAINING
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        vars(pl_module)["log"] = vars(pl_module)["log_dict"] = _nothing
        # A tensor that is made under inference mode could not be used for training afterwards
        with torch.inference_mode(False), torch.no_grad():
            yield _steps(trainer, pl_module, count)
    finally:
        trainer.state.stage = stage
        _reshard(strategy.model)
        snapshot.restore()
        set_rng_state(random_state)


def _steps(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[None]:
    for batch in islice(training_batches(trainer), count):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
        arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, 0)
        call._call_strategy_hook(trainer, "training_step", *arguments.values())
        yield


def _reshard(module: Any) -> None:
    """Let FSDP2 free what is gathered: it stands in the place of the shards, and has the weights of before."""
    for part in module.modules() if module is not None else ():
        if hasattr(part, "reshard"):
            part.reshard()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of ``log``."""
