"""BatchSizeFinder: the largest batch size that fits in memory, found on the side before training.

Sizes are doubled until one does not fit, and halved in between if asked for; each is tried in real training steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
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
    before_optimizers,
    on_each_train_loader,
    set_batch_size_attribute,
    why_no_batch_size,
    with_batch_size,
)
from lightning_accel.hooks.data import load_data_again, train_loaders
from lightning_accel.tuning.peak_memory import CountedMemory, CudaMemory, format_bytes
from lightning_accel.tuning.size_trials import SizeTrials

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BatchSizeFinder", "next_size"]

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
            that does not, until they are within 1/32.

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
    if too_large is None:
        return min(2 * fit, max_size) if fit < max_size else None
    return (fit + too_large) // 2 if too_large - fit > max(1, fit // 32) else None


class BatchSizeFinder(AccelCallback):
    """Find the largest batch size that fits in memory before training, and train with it.

    Real training steps are tried on the side with larger and larger batches, before the optimizers are made; then all
    is put back, and the fit is, bit for bit, the one whose loader was made with the size that was found.

    Args:
        min_size: The first batch size to try.
        max_size: The largest one.
        mode: ``"power"`` doubles; ``"binsearch"`` then halves between what fits and what does not, up to 1/32.
        steps_per_trial: Optimizer steps that are tried with each size, each with batches of its own. From the second on
            the optimizer's state is there all the time.
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
            **dict.fromkeys(
                ("DeepSpeedStrategy", "FSDPStrategy", "FullyShardStrategy", "ModelParallelStrategy"),
                "its shards can't be put back, or go on, after a step that ended half-way where memory ran out. Let "
                "`lightning-accel plan` tell what a batch size needs, and configure it.",
            ),
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
        self.steps_per_trial = check_int("steps_per_trial", steps_per_trial, minimum=2)
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
        self._trials: SizeTrials | None = None  # while sizes are tried

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
        if self.batch_size is not None:
            self.on_undo(set_batch_size_attribute(trainer, pl_module, self.batch_arg_name, self.batch_size))
        make_optimizers()

    def _resize(self, loader: Any) -> Any:
        """The loader with the size that is tried, or that was found."""
        if self._trials is None and self.batch_size is None:
            return loader
        if reason := why_no_batch_size(loader):
            raise MisconfigurationException(
                f"BatchSizeFinder can't set the batch size: {reason}. Give `fit` a DataLoader with a `batch_size`, or "
                "remove the finder."
            )
        if self._trials is not None:
            return self._trials.resize(loader)
        assert self.batch_size is not None
        return with_batch_size(loader, self.batch_size)

    def _search(self, trainer: Trainer, pl_module: LightningModule, make_optimizers: Callable[[], None]) -> None:
        memory = self._memory(trainer, pl_module)
        trials = SizeTrials(trainer, pl_module, memory, self.steps_per_trial, self.batch_arg_name)

        def choose(tried: Mapping[int, bool]) -> int | None:
            return next_size(tried, self.min_size, min(self.max_size, trials.samples), self.mode)

        self._trials, self.results = trials, trials.results
        try:
            trials.run(self, make_optimizers, choose)
        finally:
            self._trials = None
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # or functions that saw several sizes would keep graphs for any size
        self.batch_size = max((result["batch_size"] for result in self.results if result["fits"]), default=None)
        self._report(trainer, memory, trials)

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

    def _report(self, trainer: Trainer, memory: CudaMemory | CountedMemory, trials: SizeTrials) -> None:
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
        peak = next(result["peak"] for result in self.results if result["batch_size"] == self.batch_size)
        text = (
            f"BatchSizeFinder: a batch size of {trials.configured} was configured, {self.batch_size} was found "
            f"({format_bytes(peak)} of {format_bytes(memory.total)})."
        )
        if all(result["fits"] for result in self.results):
            by_data = trials.samples <= self.max_size
            bound = f"a rank has {trials.samples} samples in an epoch" if by_data else f"max_size is {self.max_size}"
            text += f" Larger ones were not tried: {bound}."
        finders = [other for other in trainer_callbacks(trainer) if type(other).__name__ == "LearningRateFinder"]
        if self.batch_size != trials.configured and not finders:
            text += " Another batch size may need another learning rate: see LearningRateFinder, which comes after it."
        rank_zero_info(text)

    def _table(self, memory: CudaMemory | CountedMemory) -> Table:
        from rich.table import Table

        title = f"BatchSizeFinder: {format_bytes(memory.total)}, of which {self.margin:.0%} are left free"
        table = Table("batch size", "peak memory", "of the total", "", title=title, title_justify="left")
        for result in self.results:
            peak, share = "-", "-"
            if (count := result["peak"]) is not None:
                peak = ("" if result["fits"] else "over ") + format_bytes(count)
                share = f"{count / memory.total:.0%}"
            table.add_row(str(result["batch_size"]), peak, share, result["reason"] or "fits")
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
