"""Batch sizes tried in real training steps, on the side of a fit whose optimizers are not made yet."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import IterableDataset

from lightning_accel.hooks import AccelCallback
from lightning_accel.hooks.batch_size import (
    batch_size_of,
    fetched_batches,
    first_dimension,
    release_train_data,
    samples_in,
    set_batch_size_attribute,
    set_up_train_data,
    with_batch_size,
)
from lightning_accel.hooks.lockstep import run_in_lockstep
from lightning_accel.hooks.memory import is_out_of_memory
from lightning_accel.hooks.trial import Trial, trial
from lightning_accel.hooks.weights import largest_over_ranks
from lightning_accel.tuning.peak_memory import CountedMemory, CudaMemory

__all__ = ["SizeTrials"]

_OUT_OF_MEMORY, _REFUSED = 1, 2  # why a size does not fit
_UNKNOWN = 2**62  # samples of a stream


class SizeTrials:
    """The tries of a search.

    Args:
        trainer: The Trainer of the fit.
        pl_module: Its module.
        memory: What watches over memory.
        steps: Optimizer steps to take with each size.
        attribute: The name of the attribute of module and datamodule that has the size.

    Attributes:
        results: What was tried, in order: ``batch_size``, ``fits``, ``peak`` in bytes (the most of a rank; None where
            no step was taken) and ``reason``.
        samples: How many samples the rank that has the fewest has in an epoch; more than there can be where unknown.
        configured: The batch size that the loaders had.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        memory: CudaMemory | CountedMemory,
        steps: int,
        attribute: str,
    ) -> None:
        self.results: list[dict[str, Any]] = []
        self.samples, self.configured = _UNKNOWN, 0
        self._trainer, self._module, self._memory = trainer, pl_module, memory
        self._steps, self._attribute = steps, attribute
        self._size, self._streams = 0, False
        self._side: Trial | None = None

    def run(
        self,
        callback: AccelCallback,
        make_optimizers: Callable[[], None],
        choose: Callable[[Mapping[int, bool]], int | None],
    ) -> None:
        """Try sizes, each after those before it; after one that does not fit everything is put back, and begins anew.

        Args:
            callback: The one that searches, which takes no part.
            make_optimizers: Makes the optimizers of the fit.
            choose: From the sizes that were tried, and whether they fit, to the next one; None ends the search.
        """
        tried: dict[int, bool] = {}
        size = choose(tried)
        while size is not None:
            beside = trial(self._trainer, self._module, without=[callback], reduces=False)
            with warnings.catch_warnings(), beside as self._side:
                warnings.simplefilter("ignore")  # they come in the fit, for the size that it has
                try:
                    fits = tried[size] = self._try(size, make_optimizers)
                    while fits and (size := choose(tried)) is not None:
                        fits = tried[size] = self._try(size)
                finally:
                    release_train_data(self._trainer)
            self._memory.free()  # of the optimizer too
            size = choose(tried)

    def resize(self, loader: Any) -> Any:
        """A copy of a loader, with the size that is tried.

        Raises:
            MisconfigurationException: If that can't be.
        """
        assert self._side is not None
        configured, known = batch_size_of(loader) or 0, samples_in(loader)
        if self.configured not in (0, configured):
            raise MisconfigurationException(
                f"BatchSizeFinder sets one batch size for all training loaders, but theirs are {self.configured} and "
                f"{configured}: configure one for all, or remove the finder."
            )
        self.configured = configured
        self.samples = min(self.samples, _UNKNOWN if known is None else known)
        if self._size > self.samples:
            raise MisconfigurationException(
                f"BatchSizeFinder can't try a batch size of {self._size}: a rank has {self.samples} samples in an "
                "epoch. Lower `min_size`."
            )
        self._streams |= isinstance(loader.dataset, IterableDataset)
        own = with_batch_size(self._side.own(loader), self._size)
        sampler: Any = own.batch_sampler
        if (found := len(next(iter(sampler), ()))) != self._size:
            raise MisconfigurationException(
                f"BatchSizeFinder can't set the batch size: {type(sampler).__name__} makes batches of {found} samples "
                f"where its `batch_size` is {self._size}. Let it look at that when it is iterated, or remove the "
                "finder."
            )
        return own

    def _try(self, size: int, make_optimizers: Callable[[], None] | None = None) -> bool:
        """Whether a size fits, on all ranks; where ``make_optimizers`` is given, training begins with it."""
        assert self._side is not None
        trainer, side, memory, reason = self._trainer, self._side, self._memory, ""

        def steps() -> None:
            try:
                set_up_train_data(trainer)
            except ValueError as error:  # the epoch has too few batches for a setting of the Trainer
                raise MisconfigurationException(str(error)) from None
            if make_optimizers is not None:
                side.set_up(make_optimizers)
                side.shorten_windows(2)  # more batches of a window take no more memory
            put_back.callback(set_batch_size_attribute(trainer, self._module, self._attribute, size))
            memory.begin()
            with memory.watch():
                if make_optimizers is not None:
                    side.start()
                self._take_steps(side)
            if memory.peak > memory.limit:
                raise torch.OutOfMemoryError

        def name_failure(error: Exception) -> int:
            nonlocal reason
            if is_out_of_memory(error):
                reason = "out of memory"
                return _OUT_OF_MEMORY
            if isinstance(error, MisconfigurationException):
                reason = str(error)
                return _REFUSED
            raise error

        self._size = size
        with ExitStack() as put_back:
            failure = run_in_lockstep(trainer, steps, name_failure)
        peak, fewest = largest_over_ranks(trainer, [memory.peak, -self.samples])
        self.samples = -fewest
        if failure and not reason:
            reason = f"{'out of memory' if failure == _OUT_OF_MEMORY else 'refused'} on another rank"
        if failure == _REFUSED and not self.results:
            raise MisconfigurationException(reason)
        known = None if failure == _REFUSED else peak
        self.results.append({"batch_size": size, "fits": not failure, "peak": known, "reason": reason})
        return not failure

    def _take_steps(self, side: Trial) -> None:
        largest, ended = 0, False

        def batches() -> Iterator[Any]:
            nonlocal largest
            for batch in self._memory.pass_on(fetched_batches(self._trainer)):
                largest = max(largest, first_dimension(batch))
                yield batch

        source = batches()
        try:
            for _ in range(self._steps):
                side.step(source)
        except StopIteration:  # an epoch has none of that size
            largest, ended = 0, True
        if ended or (self._streams and 0 < largest < self._size):
            raise MisconfigurationException(
                f"BatchSizeFinder can't try a batch size of {self._size}: the data gives {largest} samples at a time. "
                "Lower `min_size`."
            )
