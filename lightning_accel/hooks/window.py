"""AccumulationWindow: which micro-batches make one optimizer step.

Lightning counts windows by ``batch_idx % factor``, in three places, which is wrong as soon as the factor changes or the
last window of an epoch is short. Here the window is owned: where it began, how long it is, and how much each of its
micro-batches weighs.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_accel.errors import check_int
from lightning_accel.hooks.callback import AccelCallback
from lightning_accel.hooks.clock import moment
from lightning_accel.hooks.data import partial_gradients
from lightning_accel.hooks.gradients import drop_gradients_, gradients_are_finite, scale_gradients_
from lightning_accel.hooks.weights import WindowWeights, sum_over_ranks
from lightning_accel.schedules import Moment

__all__ = ["AccumulationWindow", "count_steps", "steps_at", "unknown_steps"]


class AccumulationWindow(AccelCallback):
    """A callback that decides at the start of each window how many micro-batches it takes.

    The loss of a micro-batch is divided by the number of micro-batches that really are in its window, so a short last
    window weighs its samples like any other. Gradients are reduced across ranks in a window's last micro-batch only.

    A subclass says how long a window is (:meth:`next_factor`), or, as its micro-batches come, whether it is full
    (:meth:`fill`, :meth:`is_full`). It may weigh micro-batches by a count (:meth:`count`).
    """

    weighs = False
    """Whether micro-batches weigh by what :meth:`count` gives, instead of all the same."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._forget()

    def _forget(self) -> None:
        self._start = 0  # micro-batches of this epoch that came before the window
        self._length = 1  # micro-batches that the window is meant to take, by which losses are divided
        self._seen: int | None = None  # the last micro-batch's number in this epoch, from 1; None before the first one
        self._restored = False
        self._estimate: tuple[tuple[float, int | None, int], int | float] | None = None
        self._weights = WindowWeights()
        self._losses: list[tuple[int, Tensor]] = []  # of the window, by the number of the batch
        self._skipped = 0  # windows in which nothing counted
        self._finite = True  # whether all gradients were, so far

    def next_factor(self, now: Moment) -> int:
        """The number of micro-batches of a window that starts at ``now``; a pure function of it."""
        raise NotImplementedError

    def count(self, batch: Any) -> Tensor:
        """How much a micro-batch weighs: how many samples or tokens its loss is the mean of."""
        raise NotImplementedError

    def look_at(self, trainer: Trainer, *, agree: bool) -> None:
        """See what windows depend on, at the start of an epoch and of a run, and where steps are counted in advance.

        Args:
            trainer: The Trainer.
            agree: Whether all ranks are here, so that they can agree; not where steps are counted in advance.
        """

    def fill(self, trainer: Trainer, batch: Any, position: int) -> None:
        """Take in the micro-batch that is about to run; ``position`` is its place in the window, from 1."""

    def is_full(self, position: int) -> bool:
        """Whether a window is complete with the micro-batch at ``position``, the last one that was filled in."""
        return position >= self._length

    def progress(self, position: int) -> str:
        """How far a window is, in words."""
        return f"{position} of {self._length} micro-batches"

    def count_steps(self, batches: int, epochs: int, max_steps: int = -1) -> int | float:
        """The optimizer steps of a whole fit, infinity where unknown; see the function :func:`count_steps`."""
        return count_steps(self.next_factor, batches, epochs, max_steps)

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the Trainer's own counting of windows."""
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and {type(self).__name__} both "
                "set how many batches make an optimizer step: remove `accumulate_grad_batches` from the Trainer."
            )
        self._forget()
        if self.is_neutral:
            return
        loop = trainer.fit_loop.epoch_loop
        self.on_undo(lambda: setattr(trainer, "accumulate_grad_batches", 1))
        self.patch(loop, "_accumulated_batches_reached", lambda _: self._complete(trainer))
        self.patch(loop.automatic_optimization, "_make_zero_grad_fn", self._make_zero_grad_fn_for(trainer))
        self.patch(trainer.strategy, "backward", self._backward)
        self._replace_estimate(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the factor of the window that a checkpoint was taken in; such a resume announces no epoch start."""
        if self.is_neutral:
            return
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise MisconfigurationException(
                f"{type(self).__name__} can't work with LBFGS, which evaluates a loss several times in a step, but "
                "would see the window's last batch only: use batches of the full size, or another optimizer."
            )
        if getattr(trainer.model, "zenflow", False):  # of a DeepSpeed engine
            raise MisconfigurationException(
                f"{type(self).__name__} can't work with ZenFlow, which has windows of its own (`update_interval`): "
                "remove one of them."
            )
        trainer.accumulate_grad_batches = self._length
        if not trainer.is_global_zero:
            self._weights.counted = torch.zeros_like(self._weights.counted)  # rank 0 has the sum over all

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a window where the previous one is complete."""
        if self.is_neutral:
            return
        ready = self._ready(trainer)  # counts this micro-batch
        first = self._seen is None
        new_epoch = ready == 1 or (self._seen is not None and ready <= self._seen)
        if self._seen is not None and not new_epoch:
            self._start += ready - self._seen - 1  # batches that were None got no backward: they take no place
        self._seen = ready
        if first or new_epoch:
            self.look_at(trainer, agree=True)
        done = self._position(trainer) - 1
        if new_epoch or done < 0 or self.is_full(done):
            self._start = ready - 1
            factor = check_int("next_factor(...)", self.next_factor(moment(trainer)), minimum=1)
            remaining = trainer.num_training_batches - self._start
            self._set_length(trainer, int(min(factor, remaining)) if math.isfinite(remaining) else factor)
        elif self._restored and not partial_gradients(trainer, pl_module):
            rank_zero_warn(
                f"The checkpoint was saved inside an accumulation window, {self.progress(done)} in, without its "
                "partial gradients: this window goes on as one of the micro-batches that are left. Add ExactResume to "
                "the callbacks, and they travel in the checkpoint."
            )
            self._start += done
            self._set_length(trainer, max(1, self._length - done))
        self._restored = False
        position = self._position(trainer)
        if position == 1:
            self._losses.clear()
        self.fill(trainer, batch, position)
        if self.weighs:
            self._weights.take(trainer, self.count(batch), first=position == 1)

    def _set_length(self, trainer: Trainer, length: int) -> None:
        self._length = trainer.accumulate_grad_batches = length

    @property
    def present_count(self) -> Tensor | None:
        """How much the present micro-batch weighs; None where all weigh the same."""
        return self._weights.count if self.weighs else None

    @contextmanager
    def repeating(self, count: Tensor | None) -> Iterator[None]:
        """Weigh losses like that of a micro-batch of this window that counts already.

        Args:
            count: What :attr:`present_count` was then.
        """
        weights, losses = self._weights, self._losses
        self._weights, self._losses = copy.copy(weights), []
        self._weights.count = count
        try:
            yield
        finally:
            self._weights, self._losses = weights, losses

    def _backward(self, original: Any, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Go backward from the loss with its weight."""
        loss = self._weights.weigh(closure_loss) if self.weighs else closure_loss
        self._losses.append(((self._seen or 1) - 1, closure_loss.detach()))
        return original(loss, *args, **kwargs)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Weigh the window's gradient right, once it is known what was in it: before clipping, after unscaling."""
        done = self._position(trainer)
        if self.is_neutral or done < 1:
            return
        scale = self._weights.finish(trainer, self._length, done) if self.weighs else self._length / done
        # where gradients are reduced and split elsewhere
        elsewhere = getattr(trainer.strategy, "weigh_gradients", None)
        if scale == 0.0:
            self._skip(trainer, elsewhere, optimizer)
        elif scale != 1.0 and elsewhere is not None:
            elsewhere(scale)
        elif scale != 1.0:
            scale_gradients_(optimizer, scale)
        looks = self._finite and elsewhere is None and _scaler(trainer) is None  # they skip such steps, and say so
        if looks and not gradients_are_finite(optimizer):
            self._finite = False
            self._say_not_finite(trainer, done)

    def _skip(self, trainer: Trainer, elsewhere: Any, optimizer: Optimizer) -> None:
        if not self._skipped:
            rank_zero_warn(
                f"Nothing counts in the batches up to number {self._ready(trainer) - 1} of epoch "
                f"{trainer.current_epoch}, of which an optimizer step would have been made: all their targets are "
                "ignored, or masked. Weights and the optimizer's state stay as they are. How many steps were skipped "
                "so is said at the end of the fit."
            )
        self._skipped += 1
        if elsewhere is not None:
            elsewhere(0.0)
        elif getattr(optimizer, "_step_supports_amp_scaling", False) and _scaler(trainer) is not None:
            scale_gradients_(optimizer, math.inf)  # the scaler can't do without gradients here, but skips such a step
        else:
            drop_gradients_(optimizer)

    def _say_not_finite(self, trainer: Trainer, done: int) -> None:
        found = [number for number, loss in self._losses if not bool(loss.isfinite().all())]
        losses = f"the loss of batch {', '.join(map(str, found))}" if found else "though the losses here are finite"
        rank = f" on rank {trainer.global_rank}" if trainer.world_size > 1 else ""
        warnings.warn(  # not of rank 0 alone: each has its own batches, and may have its own part of the gradients
            f"The gradient of the {done} batches up to number {self._ready(trainer) - 1} of epoch "
            f"{trainer.current_epoch} holds inf or NaN{rank} ({losses}). One such batch spoils its whole window, as it "
            "would a big batch, and the optimizer steps with it. Find the operation with Trainer(detect_anomaly=True). "
            "This is said once.",
            stacklevel=2,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many steps were skipped."""
        if self._skipped > 1:
            rank_zero_warn(f"{self._skipped} optimizer steps were skipped: nothing counted in the batches of each.")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where Lightning made no step after the last batch, because it did not know or it was None."""
        if self.is_neutral or self._seen is None or trainer.should_stop:
            return
        stepped = self._seen == self._ready(trainer) and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        left = self._seen - self._start
        if not stepped and not self.is_full(left):
            rank_zero_warn(
                f"The epoch ended inside an accumulation window: its last {left} batches made no optimizer step, "
                "because the epoch was cut short, the loader had fewer batches than announced, or its last batch was "
                "None. Give it its true length, or set `limit_train_batches` to it."
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the present window began, its length, and what counted in it so far."""
        return {"start": self._start, "length": self._length} | (self._weights.state_dict() if self.weighs else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the window that the checkpoint was taken in."""
        self._start, self._length, self._restored = state_dict["start"], state_dict["length"], True
        if self.weighs:
            self._weights.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what counted on all ranks; not on an exception, when the others may never come."""
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if "counted" in state and not trainer.interrupted:
            state["counted"] = sum_over_ranks(trainer, state["counted"]).cpu()

    @staticmethod
    def _ready(trainer: Trainer) -> int:
        return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _position(self, trainer: Trainer) -> int:
        """The present micro-batch's place in the window, from 1."""
        return self._ready(trainer) - self._start

    def _complete(self, trainer: Trainer) -> bool:
        """Whether the window is complete with the present batch; one that is None completes nothing."""
        none = self._seen is not None and self._seen != self._ready(trainer)
        return not none and self.is_full(self._position(trainer))

    def _make_zero_grad_fn_for(self, trainer: Trainer) -> Any:
        def make(original: Any, batch_idx: int, optimizer: Optimizer) -> Any:
            if self._position(trainer) > 1:
                return None
            # with a factor of 1 every batch index is a first one, so the hooks still get the real `batch_idx`
            length, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, 1
            try:
                return original(batch_idx, optimizer)
            finally:
                trainer.accumulate_grad_batches = length

        return make

    def _replace_estimate(self, trainer: Trainer) -> None:
        """Let ``trainer.estimated_stepping_batches`` count the windows as they will be.

        It is a property, so it can't be replaced on the instance: the Trainer gets a subclass of its own class.
        """
        window, original = self, type(trainer)

        def estimated_stepping_batches(trainer: Trainer) -> int | float:
            plain = original.estimated_stepping_batches.fget(trainer)  # type: ignore[attr-defined]
            batches, epochs = trainer.num_training_batches, trainer.max_epochs
            if epochs is None or epochs < 1 or not math.isfinite(batches):
                return plain  # type: ignore[no-any-return]
            window.look_at(trainer, agree=False)
            key = (batches, epochs, trainer.max_steps)
            if window._estimate is None or window._estimate[0] != key:
                window._estimate = (key, window.count_steps(int(batches), epochs, trainer.max_steps))
            return window._estimate[1]

        trainer.__class__ = type(
            original.__name__, (original,), {"estimated_stepping_batches": property(estimated_stepping_batches)}
        )
        self.on_undo(lambda: setattr(trainer, "__class__", original))


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def count_steps(next_factor: Any, batches: int, epochs: int, max_steps: int = -1) -> int:
    """The optimizer steps of a whole fit.

    Args:
        next_factor: From a ``Moment`` to the length of a window that starts there.
        batches: Training batches in an epoch.
        epochs: Epochs of the fit.
        max_steps: The Trainer's limit on optimizer steps; -1 for none.
    """
    step = 0
    for epoch in range(epochs):
        done = 0
        while done < batches:
            if step == max_steps:
                return step
            position = epoch + done / batches
            fit = max(position / epochs, step / max_steps if max_steps > 0 else 0.0)
            now = Moment(step=step, batch=epoch * batches + done, epoch=position, fit=fit)
            done += min(next_factor(now), batches - done)
            step += 1
    return step


def steps_at(factor: int, batches: int, epochs: int, max_steps: int = -1) -> int:
    """What :func:`count_steps` gives where every window is of ``factor`` batches."""
    steps = math.ceil(batches / factor) * epochs
    return steps if max_steps == -1 else min(steps, max_steps)


def unknown_steps(takes: str, max_steps: int) -> int | float:
    """The optimizer steps of a fit whose windows can't be known before: the limit, or infinity, which is said.

    Args:
        takes: What a step takes, in words.
        max_steps: The Trainer's limit on optimizer steps; -1 for none.
    """
    if max_steps != -1:
        return max_steps
    rank_zero_warn(
        f"How many optimizer steps this fit will have is unknown: a step takes {takes}, so "
        "`trainer.estimated_stepping_batches` is infinite. For a schedule with an end, set `max_steps` of the Trainer."
    )
    return math.inf
