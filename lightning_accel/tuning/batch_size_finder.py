"""BatchSizeFinder: the largest batch size that fits in memory, found on the side before training.

Sizes are doubled until one does not fit, and halved in between if asked for; each is tried in real training steps.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.errors import check_bytes, check_choice, check_int, check_number
from lightning_accel.hooks import AccelCallback, Contract, trainer_callbacks
from lightning_accel.hooks.batch_size import (
    batch_size_of,
    before_optimizers,
    fetched_batches,
    first_dimension,
    on_each_train_loader,
    release_train_data,
    samples_in,
    set_batch_size_attribute,
    set_up_train_data,
    why_no_batch_size,
    with_batch_size,
)
from lightning_accel.hooks.data import load_data_again, train_loaders
from lightning_accel.hooks.lockstep import run_in_lockstep
from lightning_accel.hooks.memory import is_out_of_memory
from lightning_accel.hooks.trial import Trial, trial
from lightning_accel.hooks.weights import max_over_ranks
from lightning_accel.tuning.peak_memory import CountedMemory, CudaMemory, format_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BatchSizeFinder", "next_size"]

_OUT_OF_MEMORY, _REFUSED = 1, 2  # why a size does not fit
_UNKNOWN = 2**62  # samples of a stream
_NO_SIZE = "BatchSizeFinder can't set the batch size"
_OTHER_DATA = "Give `fit` a DataLoader with a `batch_size`, or remove the finder."
_WAYS_OUT = (
    "Use a smaller model or shorter samples; keep less for a sample with MicroBatching or a lower precision, less for "
    "the optimizer with LowBitOptimizer, less for the gradients with OptimizerInBackward"
)


def next_size(tried: Mapping[int, bool], min_size: int, max_size: int, mode: str = "power") -> int | None:
    """The batch size to try next; None where the search is over.

    Args:
        tried: The sizes that were tried, and whether they fit.
        min_size: The first size to try.
        max_size: The largest one.
        mode: ``"power"``: only doubling; ``"binsearch"``: then also sizes between the last that fits and the first
            that does not.

    Example:
        >>> next_size({2: True, 4: True}, 2, 100), next_size({2: True, 4: True, 8: False}, 2, 100)
        (8, None)
        >>> next_size({2: True, 4: True, 8: False}, 2, 100, "binsearch")
        6
    """
    if not tried:
        return min_size
    fit = max((size for size, fits in tried.items() if fits), default=None)
    if fit is None:
        return None
    too_large = min((size for size, fits in tried.items() if not fits), default=None)
    if mode == "power":
        return 2 * fit if too_large is None and 2 * fit <= max_size else None
    following = min(2 * fit, max_size) if too_large is None else (fit + too_large) // 2
    return following if following > fit else None


class BatchSizeFinder(AccelCallback):
    """Find the largest batch size that fits in memory before training, and train with it.

    Real training steps are tried on the side with larger and larger batches, before the optimizers are made; then all
    is put back, and the fit is, bit for bit, the one whose loader was made with the size that was found.

    Args:
        min_size: The first batch size to try.
        max_size: The largest one.
        mode: ``"power"`` doubles; ``"binsearch"`` then halves between what fits and what does not.
        steps_per_trial: Optimizer steps that are tried with each size, each with batches of its own. From the second on
            the optimizer's state and gradients are there all the time.
        margin: The fraction of the memory that is left free.
        memory_budget: How much memory the training of one process may take, in bytes or as in ``"8GiB"``. None: what is
            free on its CUDA device. Other devices need one: a CPU runs out when the machine has long begun to swap.
        batch_arg_name: The attribute or hyperparameter of module and datamodule that is set to the size, if there.
        enabled: False trains with the configured size.

    Attributes:
        batch_size: The size that was found, of one rank; None where none was.
        results: What was tried: ``batch_size``, ``fits``, ``peak`` (bytes, the most of a rank) and ``reason``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has the wrong value.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> finder = BatchSizeFinder(max_size=1024, memory_budget="8GiB")
        >>> trainer = Trainer(callbacks=[finder], logger=False, enable_checkpointing=False)
    """

    contract = Contract(
        purpose="Find the largest batch size that fits in memory before training.",
        touches=frozenset({"data order"}),
        acts="once, before training",
        expects="batches as large as memory allows",
        docs="methods/batch_size_finder",
        once=True,
        refuses={
            "FullyShardStrategy": "its blocks can't go on after a step that ended half-way, where memory ran out. Let "
            "`lightning-accel plan` tell what a batch size needs, and configure it.",
            "ModelParallelStrategy": "its parts can't go on after a step that ended half-way, where memory ran out. "
            "Search on a single device, and configure what was found.",
            "MicroBatching": "it splits each batch into parts that fit, so no batch is too large. Choose the batch "
            "size by what trains best, and remove the finder.",
        },
    )

    def __init__(
        self,
        min_size: int = 2,
        max_size: int = 8192,
        mode: Literal["power", "binsearch"] = "power",
        steps_per_trial: int = 3,
        margin: float = 0.1,
        memory_budget: int | str | None = None,
        batch_arg_name: str = "batch_size",
        enabled: bool = True,
    ) -> None:
        self.min_size = check_int("min_size", min_size, minimum=1)
        self.max_size = check_int("max_size", max_size, minimum=self.min_size)
        self.mode = check_choice("mode", mode, ("power", "binsearch"))
        self.steps_per_trial = check_int("steps_per_trial", steps_per_trial, minimum=1)
        self.margin = check_number("margin", margin, 0, 1, open_high=True)
        self.memory_budget = None if memory_budget is None else check_bytes("memory_budget", memory_budget)
        if not isinstance(batch_arg_name, str):
            raise TypeError(f"Expected `batch_arg_name` to be a str, but got {batch_arg_name!r}.")
        if not isinstance(enabled, bool):
            raise TypeError(f"Expected `enabled` to be a bool, but got {enabled!r}.")
        self.batch_arg_name, self.enabled = batch_arg_name, enabled
        super().__init__(
            min_size=min_size,
            max_size=max_size,
            mode=mode,
            steps_per_trial=steps_per_trial,
            margin=self.margin,
            memory_budget=self.memory_budget,
            batch_arg_name=batch_arg_name,
            enabled=enabled,
        )
        self._fresh()

    def _fresh(self) -> None:
        self.batch_size: int | None = None
        self.results: list[dict[str, Any]] = []
        self._resumed = False
        self._size: int | None = None  # what loaders get now
        self._side: Trial | None = None  # while sizes are tried
        self._configured: set[int] = set()
        self._samples = _UNKNOWN  # of the rank that has the fewest

    @property
    def is_neutral(self) -> bool:
        """Whether it is off."""
        return not self.enabled

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the search run before optimizers and schedulers are made, which may depend on the number of batches."""
        self._fresh()
        if not self.enabled:
            return
        device = trainer.strategy.root_device
        if self.memory_budget is None and device.type != "cuda":
            raise MisconfigurationException(
                f"BatchSizeFinder can't tell how much memory may be used on {device.type}, which runs out when the "
                "machine has long begun to swap: give it `memory_budget`, in bytes or as in '8GiB', for each process."
            )
        on_each_train_loader(self, trainer, self._resize)
        before_optimizers(self, trainer, partial(self._begin, trainer, pl_module))

    def _begin(self, trainer: Trainer, pl_module: LightningModule, make_optimizers: Callable[[], None]) -> None:
        if trainer.limit_train_batches == 0:
            make_optimizers()
            return
        if train_loaders(trainer):
            rank_zero_warn(
                "The training data was set up before BatchSizeFinder searched, as `trainer.estimated_stepping_batches` "
                "does in `setup` or `configure_model`: what was computed there holds for the configured batch size. "
                "Compute it in `configure_optimizers`."
            )
            load_data_again(trainer)
        if self.batch_size is None and self._resumed:
            rank_zero_warn(
                "BatchSizeFinder does not search in a run that goes on from a checkpoint, and the checkpoint has no "
                "batch size that it found: the run goes on with the configured one."
            )
        elif self.batch_size is None:
            self._search(trainer, pl_module, make_optimizers)
        self._size = self.batch_size
        if self._size is not None:
            self.on_undo(set_batch_size_attribute(trainer, pl_module, self.batch_arg_name, self._size))
        make_optimizers()

    def _resize(self, loader: Any) -> Any:
        """The loader with the present size."""
        if self._size is None:
            return loader
        if reason := why_no_batch_size(loader):
            raise MisconfigurationException(f"{_NO_SIZE}: {reason}. {_OTHER_DATA}")
        if self._side is None:
            return with_batch_size(loader, self._size)
        self._configured.add(batch_size_of(loader) or 0)
        if len(self._configured) > 1:
            raise MisconfigurationException(
                "BatchSizeFinder sets one batch size for all training loaders, but theirs are "
                f"{', '.join(map(str, sorted(self._configured)))}: configure one for all, or remove the finder."
            )
        own = with_batch_size(self._side.own(loader), self._size)
        self._samples = min(self._samples, samples_in(loader) or _UNKNOWN)
        if self._size > self._samples:
            raise MisconfigurationException(
                f"BatchSizeFinder can't try a batch size of {self._size}: a rank has {self._samples} samples in an "
                "epoch. Lower `min_size`."
            )
        sampler: Any = own.batch_sampler
        if (found := len(next(iter(sampler), []))) != self._size:
            raise MisconfigurationException(
                f"{_NO_SIZE}: {type(sampler).__name__} makes batches of {found} samples where its `batch_size` is "
                f"{self._size}, so it does not look at that when it is iterated. {_OTHER_DATA}"
            )
        return own

    # --------------------------------------------------------------------------------------------------------- search

    def _search(self, trainer: Trainer, pl_module: LightningModule, make_optimizers: Callable[[], None]) -> None:
        memory = self._memory(trainer, pl_module)
        tried: dict[int, bool] = {}
        while (size := self._next(tried)) is not None:
            with warnings.catch_warnings(), trial(trainer, pl_module, without=[self], reduces=False) as side:
                warnings.simplefilter("ignore")  # they come in the fit, for the size that it has
                self._side, begun = side, False
                try:
                    while size is not None:
                        prepare = None if begun else make_optimizers
                        tried[size] = self._try(trainer, pl_module, memory, size, prepare)
                        if not tried[size]:  # a step that ended half-way is put back as a whole
                            break
                        size, begun = self._next(tried), True
                finally:
                    release_train_data(trainer)
                    self._side = self._size = None
        memory.free()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # functions compiled for other sizes, or called uncompiled under `memory.watch`
        self.batch_size = max((size for size, fits in tried.items() if fits), default=None)
        self._report(trainer, memory)

    def _next(self, tried: Mapping[int, bool]) -> int | None:
        return next_size(tried, self.min_size, min(self.max_size, self._samples), self.mode)

    def _memory(self, trainer: Trainer, pl_module: LightningModule) -> CudaMemory | CountedMemory:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            return CudaMemory(device, self.memory_budget, self.margin)
        assert self.memory_budget is not None
        buckets = 0
        if isinstance(trainer.strategy.model, DistributedDataParallel):  # as many bytes as it reduces
            buckets = sum(parameter.nbytes for parameter in pl_module.parameters() if parameter.requires_grad)
        model = [*pl_module.parameters(), *pl_module.buffers()]
        return CountedMemory(model, buckets, self.memory_budget, self.margin)

    def _try(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        memory: CudaMemory | CountedMemory,
        size: int,
        make_optimizers: Callable[[], None] | None,
    ) -> bool:
        """Whether a size fits, on all ranks; where ``make_optimizers`` is given, training begins with it."""
        assert self._side is not None
        side, reason = self._side, ""

        def steps() -> None:
            if make_optimizers is not None:
                side.set_up(make_optimizers)
                side.shorten_windows(2)  # more batches of a window take no more memory
            try:
                set_up_train_data(trainer)
            except ValueError as error:  # the epoch has too few batches for a setting of the Trainer
                raise MisconfigurationException(str(error)) from None
            memory.begin()
            put_back.callback(set_batch_size_attribute(trainer, pl_module, self.batch_arg_name, size))
            with memory.watch():
                if make_optimizers is not None:
                    side.start()
                self._take_steps(trainer, side, memory, size)
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
            failure = run_in_lockstep(trainer, steps, name_failure, memory.free)
        peak, fewest = max_over_ranks(trainer, torch.tensor([memory.peak, -self._samples])).tolist()
        self._samples = -fewest
        if failure and not reason:
            reason = "out of memory on another rank" if failure == _OUT_OF_MEMORY else "refused on another rank"
        if failure == _REFUSED and not self.results:
            raise MisconfigurationException(reason)
        self.results.append({"batch_size": size, "fits": not failure, "peak": peak, "reason": reason})
        return not failure

    def _take_steps(self, trainer: Trainer, side: Trial, memory: CudaMemory | CountedMemory, size: int) -> None:
        largest = 0

        def batches() -> Iterator[Any]:
            nonlocal largest
            for batch in memory.pass_on(fetched_batches(trainer)):
                largest = max(largest, first_dimension(batch))
                yield batch

        source = batches()
        try:
            for _ in range(self.steps_per_trial):
                side.step(source)
        except StopIteration:
            largest = -1
        stream = self._samples == _UNKNOWN
        if largest < 0 or (stream and 0 < largest < size):
            raise MisconfigurationException(
                f"BatchSizeFinder can't try a batch size of {size}: the data gives {max(largest, 0)} samples at a "
                "time. Lower `min_size`."
            )

    def _report(self, trainer: Trainer, memory: CudaMemory | CountedMemory) -> None:
        if trainer.is_global_zero and not trainer.barebones:
            from rich import print as rich_print

            rich_print(self._table(memory))
        last = self.results[-1]
        if self.batch_size is None:
            raise MisconfigurationException(
                f"BatchSizeFinder found no batch size that fits: {last['batch_size']} took at least "
                f"{format_bytes(last['peak'])} of the {format_bytes(memory.limit)} that are allowed "
                f"({format_bytes(memory.total)} less the margin of {self.margin:g}). {_WAYS_OUT}."
            )
        peak = max(result["peak"] for result in self.results if result["batch_size"] == self.batch_size)
        configured = min(self._configured)
        text = (
            f"BatchSizeFinder: a batch size of {configured} was configured, {self.batch_size} was found "
            f"({format_bytes(peak)} of {format_bytes(memory.total)})."
        )
        if all(result["fits"] for result in self.results):
            text += f" Larger ones were not tried: {self._bound()}."
        finders = [other for other in trainer_callbacks(trainer) if type(other).__name__ == "LearningRateFinder"]
        if self.batch_size != configured and not finders:
            text += " Another batch size may need another learning rate: see LearningRateFinder, which comes after it."
        rank_zero_info(text)

    def _bound(self) -> str:
        if self._samples <= self.max_size:
            return f"a rank has {self._samples} samples in an epoch"
        return f"max_size is {self.max_size}"

    def _table(self, memory: CudaMemory | CountedMemory) -> Table:
        from rich.table import Table

        title = f"BatchSizeFinder: {format_bytes(memory.total)}, of which {self.margin:.0%} are left free"
        table = Table("batch size", "peak memory", "of the total", "", title=title, title_justify="left")
        for result in self.results:
            least, share = "" if result["fits"] else "over ", result["peak"] / memory.total
            size, reason = str(result["batch_size"]), result["reason"] or "fits"
            table.add_row(size, least + format_bytes(result["peak"]), f"{share:.0%}", reason)
        return table

    # --------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """What was found and tried."""
        return {"batch_size": self.batch_size, "results": self.results} if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was found."""
        if state_dict:
            self.batch_size, self.results = state_dict["batch_size"], state_dict["results"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that this run goes on from a checkpoint."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._resumed = True
