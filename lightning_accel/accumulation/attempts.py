"""The step of a batch, made again in smaller micro-batches where memory ran out, on all ranks at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_accel.accumulation.auto_size import AutoSize
from lightning_accel.hooks.memory import LiveBytes, is_out_of_memory
from lightning_accel.hooks.micro import MicroBatch, MicroStep, reducer_of, why_not_auto
from lightning_accel.hooks.reduction import GradientReducer
from lightning_accel.hooks.step_state import StepState
from lightning_accel.hooks.tensors import tensors_in
from lightning_accel.hooks.weights import largest_over_ranks

__all__ = ["Attempts"]

_MANY = 2**40  # above any number of samples


class Attempts:
    """Makes steps whose size follows from where memory ran out.

    No rank waits for another one in the forward and backward of its micro-batches. After them all ranks agree whether
    memory sufficed everywhere, and only then are gradients reduced. Where it did not, all of them put back what the
    step changed and make it again.

    Args:
        grow_after: As for :class:`AutoSize`.
        budget: Bytes at which memory counts as run out; None: where it really does.
    """

    def __init__(self, grow_after: int | None, budget: int | None) -> None:
        self.sizes = AutoSize(grow_after)
        self._budget = budget
        self._limits_device = False
        self._state: StepState | None = None
        self._epoch = -1
        self._reducer: GradientReducer | None = None

    def limit_device(self, device: torch.device) -> Callable[[], None]:
        """Let the budget hold where memory is allocated, if this is a CUDA device; return what undoes it."""
        if device.type != "cuda" or self._budget is None:
            return lambda: None
        total = torch.cuda.get_device_properties(device).total_memory
        before: Any = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, self._budget / total), device)
        self._limits_device = True
        return partial(torch.cuda.set_per_process_memory_fraction, before, device)

    def run(
        self,
        trainer: Trainer,
        step: MicroStep,
        optimizer: Optimizer,
        batch: Any,
        split: Callable[[int | None], list[MicroBatch]],
    ) -> tuple[list[MicroBatch], list[Any]]:
        """Make the step; a collective operation on several ranks.

        Args:
            trainer: The Trainer.
            step: The step.
            optimizer: The optimizer.
            batch: The batch.
            split: Splits it into micro-batches of at most so many samples.

        Returns:
            The micro-batches it was made of, and what it returned for each.
        """
        reducer = self._prepare(trainer)
        assert self._state is not None
        self._state.keep()
        while True:
            failure: str | None = None
            results: list[Any] = []
            parts = split(self.sizes.size)
            samples = max((part.samples for part in parts), default=0)
            try:
                with self._limit(trainer, batch):
                    ready = partial(self._state.keep_gradients, optimizer)
                    results = step.run(parts, reduce=reducer is None, ready=ready)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = f"{type(error).__name__}: {error}"
            reduces = reducer is not None and step.reduces
            own = [0 if failure is None else _MANY - samples, len(parts) > 1]
            failed, is_split, *present = largest_over_ranks(
                trainer, [*own, *(reducer.present() if reducer is not None and reduces else ())]
            )
            if not failed:
                break
            results.clear()
            self._undo(trainer, step)
            samples = _MANY - failed
            if samples < 2:
                if failure is not None and samples == 0:
                    split(1)  # which says why it can't
                self._give_up(trainer, step, failure)
            self.sizes.failed(samples)
            rank_zero_info(
                f"MicroBatching: memory ran out in batch {step.batch_idx} of epoch {trainer.current_epoch} with "
                f"{samples} samples at once; from here on at most {self.sizes.size}."
            )
        if reducer is not None and reduces:
            reducer.reduce(present)
        if self.sizes.passed(bool(is_split)):
            rank_zero_info(
                f"MicroBatching: memory sufficed for a while, so {self.sizes.size} samples are tried at once."
            )
        return parts, results

    def _prepare(self, trainer: Trainer) -> GradientReducer | None:
        if self._state is None or self._epoch != trainer.current_epoch:  # modules may have changed
            self._state, self._epoch = StepState(trainer.lightning_module), trainer.current_epoch
        before, self._reducer = self._reducer, reducer_of(trainer, self._reducer)
        if self._reducer is not before and (reason := why_not_auto(trainer)):
            raise MisconfigurationException(f"MicroBatching(size='auto') {reason}")
        if self._reducer is not None:
            self._reducer.before_forward()
        return self._reducer

    def _limit(self, trainer: Trainer, batch: Any) -> AbstractContextManager[Any]:
        if self._budget is None or self._limits_device:
            return nullcontext()
        module = trainer.lightning_module
        known = [*module.parameters(), *module.buffers(), *tensors_in(batch)]
        known += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        return LiveBytes(self._budget, known)

    def _undo(self, trainer: Trainer, step: MicroStep) -> None:
        assert self._state is not None
        self._state.restore()
        step.logs.forget()
        gc.collect()  # what is held in cycles, such as those of an exception and its frames
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.empty_cache()

    def _give_up(self, trainer: Trainer, step: MicroStep, failure: str | None) -> None:
        device, what = trainer.strategy.root_device, failure or "on another rank."
        if device.type == "cuda":
            what += f" Between steps {torch.cuda.memory_allocated(device):,} bytes are allocated."
        raise torch.OutOfMemoryError(
            f"Memory ran out in batch {step.batch_idx} of epoch {trainer.current_epoch} with a single sample, which "
            f"MicroBatching can't split: {what} What is left to save is not in the batch: see `lightning-accel plan`, "
            "LowBitOptimizer, and activation checkpointing."
        )
