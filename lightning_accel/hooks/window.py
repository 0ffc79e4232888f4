"""AccumulationWindow: which micro-batches make one optimizer step.

Lightning counts windows by ``batch_idx % factor``, in three places, which is wrong as soon as the factor changes or the
last window of an epoch is short. Here the window is owned: where it began and how long it is.
"""

from __future__ import annotations

import math
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_accel.errors import check_int
from lightning_accel.hooks.callback import AccelCallback
from lightning_accel.hooks.clock import moment
from lightning_accel.hooks.data import partial_gradients
from lightning_accel.schedules import Moment

__all__ = ["AccumulationWindow", "count_steps"]


class AccumulationWindow(AccelCallback):
    """A callback that decides at the start of each window how many micro-batches it takes.

    The loss of a micro-batch is divided by the number of micro-batches that really are in its window, so a short last
    window weighs its samples like any other. Gradients are reduced across ranks in a window's last micro-batch only.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._start = 0  # micro-batches of this epoch that came before the window
        self._length = 1  # micro-batches that the window is meant to take
        self._seen: int | None = None  # the last micro-batch's number in this epoch, from 1; None before the first one
        self._restored = False
        self._estimate: tuple[tuple[float, int | None, int], int] | None = None

    def next_factor(self, now: Moment) -> int:
        """The number of micro-batches of a window that starts at ``now``; a pure function of it."""
        raise NotImplementedError

    def count_steps(self, batches: int, epochs: int, max_steps: int = -1) -> int:
        """The optimizer steps of a whole fit; see the function :func:`count_steps`."""
        return count_steps(self.next_factor, batches, epochs, max_steps)

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the Trainer's own counting of windows."""
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and {type(self).__name__} both "
                "set how many batches make an optimizer step: remove `accumulate_grad_batches` from the Trainer."
            )
        self._start, self._length, self._seen, self._restored, self._estimate = 0, 1, None, False, None
        if self.is_neutral:
            return
        loop = trainer.fit_loop.epoch_loop
        self.on_undo(lambda: setattr(trainer, "accumulate_grad_batches", 1))
        self.patch(loop, "_accumulated_batches_reached", lambda _: self._complete(trainer))
        self.patch(loop.automatic_optimization, "_make_zero_grad_fn", self._make_zero_grad_fn_for(trainer))
        self._replace_estimate(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the factor of the window that a checkpoint was taken in; such a resume announces no epoch start."""
        if not self.is_neutral:
            trainer.accumulate_grad_batches = self._length

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a window where the previous one is complete."""
        if self.is_neutral:
            return
        ready = self._ready(trainer)  # counts this micro-batch
        new_epoch = ready == 1 or (self._seen is not None and ready <= self._seen)
        if self._seen is not None and not new_epoch:
            self._start += ready - self._seen - 1  # batches that were None got no backward: they take no place
        self._seen = ready
        position = self._position(trainer)
        if new_epoch or not 1 <= position <= self._length:
            self._start = ready - 1
            factor = check_int("next_factor(...)", self.next_factor(moment(trainer)), minimum=1)
            remaining = trainer.num_training_batches - self._start
            self._length = int(min(factor, remaining)) if math.isfinite(remaining) else factor
            trainer.accumulate_grad_batches = self._length
        elif self._restored and not partial_gradients(trainer, pl_module):
            rank_zero_warn(
                f"The checkpoint was saved inside an accumulation window, {position - 1} of {self._length} "
                "micro-batches in, without its partial gradients: this window goes on as one of the micro-batches "
                "that are left. Add ExactResume to the callbacks, and they travel in the checkpoint."
            )
            self._start += position - 1
            self._length -= position - 1
            trainer.accumulate_grad_batches = self._length
        self._restored = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Weigh a window right that ended early because a loader of unknown length ran out."""
        done = self._position(trainer)
        if 0 < done < self._length:
            if (weigh := getattr(trainer.strategy, "weigh_gradients", None)) is not None:
                weigh(self._length / done)  # its gradients are reduced and split elsewhere
                return
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._length / done)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where Lightning made no step after the last batch, because it did not know or it was None."""
        if self.is_neutral or self._seen is None or trainer.should_stop:
            return
        stepped = self._seen == self._ready(trainer) and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if not stepped and (left := self._seen - self._start) < self._length:
            rank_zero_warn(
                f"The epoch ended inside an accumulation window: its last {left} batches made no optimizer step, "
                "because the epoch was cut short, the loader had fewer batches than announced, or its last batch was "
                "None. Give it its true length, or set `limit_train_batches` to it."
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the present window began, and its length."""
        return {"start": self._start, "length": self._length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the window that the checkpoint was taken in."""
        self._start, self._length, self._restored = state_dict["start"], state_dict["length"], True

    @staticmethod
    def _ready(trainer: Trainer) -> int:
        return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _position(self, trainer: Trainer) -> int:
        """The present micro-batch's place in the window, from 1."""
        return self._ready(trainer) - self._start

    def _complete(self, trainer: Trainer) -> bool:
        """Whether the window is complete with the present batch; one that is None completes nothing."""
        none = self._seen is not None and self._seen != self._ready(trainer)
        return not none and self._position(trainer) >= self._length

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
            key = (batches, epochs, trainer.max_steps)
            if window._estimate is None or window._estimate[0] != key:
                window._estimate = (key, window.count_steps(int(batches), epochs, trainer.max_steps))
            return window._estimate[1]

        trainer.__class__ = type(
            original.__name__, (original,), {"estimated_stepping_batches": property(estimated_stepping_batches)}
        )
        self.on_undo(lambda: setattr(trainer, "__class__", original))


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
