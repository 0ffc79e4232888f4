"""Where a fit is now, and how long it will be: the only place that reads Lightning's progress counters."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from lightning_accel.hooks.callback import trainer_callbacks
from lightning_accel.schedules import FitLength, Moment

__all__ = ["batches_done", "fit_length", "logs_now", "moment"]


def _progress(trainer: Trainer, which: str) -> Any:
    """A counter of Lightning's loops (untyped there: its class depends on what it counts)."""
    loop = trainer.fit_loop.epoch_loop.batch_progress if which.startswith("batch") else trainer.fit_loop.epoch_progress
    return loop.total if which == "batch total" else loop.current


def batches_done(trainer: Trainer) -> int:
    """Training batches processed so far, over all epochs.

    Not ``ready``: a checkpoint saved while a batch was in flight (on an exception) counts it as ready, and the resumed
    run would number the same batch differently.
    """
    return int(_progress(trainer, "batch total").processed)


def logs_now(trainer: Trainer) -> bool:
    """Whether loggers get what is logged in this batch's step, by ``Trainer(log_every_n_steps=...)``."""
    return bool(trainer._logger_connector.should_update_logs)


def moment(trainer: Trainer) -> Moment:
    """Where the fit is now.

    A collective operation where the fit is limited by ``max_time`` and has several ranks: all of them must call it, and
    all get rank 0's clock.
    """
    epochs = _epochs_done(trainer)
    fractions = []
    if trainer.max_steps > 0:
        fractions.append(trainer.global_step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        fractions.append(epochs / trainer.max_epochs)
    if (elapsed := _elapsed_fraction(trainer)) is not None:
        fractions.append(trainer.strategy.broadcast(elapsed) if trainer.world_size > 1 else elapsed)
    fit = min(1.0, max(fractions)) if fractions else None
    return Moment(step=trainer.global_step, batch=batches_done(trainer), epoch=epochs, fit=fit)


def fit_length(trainer: Trainer) -> FitLength:
    """How long the fit will be, in each unit; ``None`` where that is unknown (no limit, a loader without length)."""
    epochs = float(trainer.max_epochs) if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
    steps: float | None = None
    if epochs is not None or trainer.max_steps > 0:
        estimate = float(trainer.estimated_stepping_batches)  # makes the train loader, where it is not made yet
        steps = estimate if math.isfinite(estimate) and estimate > 0 else None
    per_epoch = _batches_per_epoch(trainer)
    batches = epochs * per_epoch if epochs is not None and per_epoch is not None else None
    return FitLength(steps=steps, batches=batches, epochs=epochs)


def _epochs_done(trainer: Trainer) -> float:
    """Epochs done, with the fraction of a running one; between two epochs the batch counter is that of the last."""
    progress, batches = _progress(trainer, "epoch"), _batches_per_epoch(trainer)
    done, in_epoch = int(progress.processed), progress.started > progress.processed
    if batches is None:
        return float(done)
    batch = int(_progress(trainer, "batch").processed)
    if progress.started == progress.processed:
        # Between two epochs; or in one of a run that was resumed from a checkpoint of an epoch's last batch, where
        # Lightning counts one epoch less as started from then on. Then all batches of the epochs before are counted.
        in_epoch = batches_done(trainer) - batch >= done * batches > 0
    return done + batch / batches if in_epoch else float(done)


def _batches_per_epoch(trainer: Trainer) -> int | None:
    batches = trainer.num_training_batches
    return int(batches) if math.isfinite(batches) and batches > 0 else None


def _elapsed_fraction(trainer: Trainer) -> float | None:
    """The largest fraction of a time limit that has passed, or ``None`` where there is no limit."""
    fractions = []
    for callback in trainer_callbacks(trainer):
        if isinstance(callback, Timer) and (remaining := callback.time_remaining()) is not None:
            elapsed = callback.time_elapsed()
            fractions.append(elapsed / max(elapsed + remaining, 1e-9))
    return max(fractions, default=None)
