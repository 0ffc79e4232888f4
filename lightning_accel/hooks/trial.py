"""A trial: a few training steps on the side, after which everything is as it was, bit for bit.

A search (for a learning rate, for a batch size) has to train a little to see what happens. Inside a :func:`trial` steps
are those of the fit: the module's own hooks, precision, gradient accumulation and the methods of this package act in
them; loggers, checkpoints, progress bars, schedulers and callbacks of others see nothing. At its end weights, the
optimizer's state, random numbers, the loops' counters, metrics and the state of those methods are put back.
"""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel.hooks.callback import AccelCallback, Patched, trainer_callbacks
from lightning_accel.hooks.data import train_loaders
from lightning_accel.hooks.rng import get_rng_state, set_rng_state
from lightning_accel.hooks.snapshot import Snapshot

__all__ = ["Trial", "before_training", "loader_parts", "training_batches", "trial"]

_OBSERVED = frozenset({"random state", "data order"})  # what touches nothing else has no part in a step
_UNREACHABLE = {
    "DeepSpeedStrategy": "its engine keeps weights, gradients and the optimizer's state in forms of its own",
    "FSDPStrategy": "it keeps weights in flat shards of its own",
}


class Trial:
    """The steps of a trial; made by :func:`trial`.

    Attributes:
        callbacks: The callbacks that take part.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks
        self._trainer, self._module = trainer, pl_module
        self._outputs = _Outputs()
        self._progress: Snapshot | None = None
        self._kept: list[Snapshot] = []

    def set_up(self, make_optimizers: Callable[[], None]) -> None:
        """Do what the fit does from there on to the start of training; for a trial that begins before it.

        Args:
            make_optimizers: Makes the optimizers of the fit.
        """
        strategy = self._trainer.strategy
        make_optimizers()
        strategy.setup_precision_plugin()
        _optimizers_to_device(strategy.optimizers, strategy.root_device)
        call._call_callback_hooks(self._trainer, "on_fit_start")
        call._call_lightning_module_hook(self._trainer, "on_fit_start")

    def own(self, loader: Any) -> Any:
        """A copy of a loader, to be gone through here; what changes in the loader then is put back too."""
        self._kept.append(Snapshot(_parts(loader), left=_datasets(loader)))
        return _copy(loader)

    def shorten_windows(self, batches: int) -> None:
        """Let no optimizer step take more than so many batches."""
        loop = self._trainer.fit_loop.epoch_loop
        reached, begun = loop._accumulated_batches_reached, loop.batch_progress.current.ready
        loop.__dict__["_accumulated_batches_reached"] = lambda: (
            reached() or loop.batch_progress.current.ready >= begun + batches
        )

    def start(self) -> None:
        """Call the hooks of the start of training, of the module and of those callbacks.

        Needed where the trial begins before the fit calls them. What they change is put back too.
        """
        for hook in ("on_train_start", "on_train_epoch_start"):
            call._call_callback_hooks(self._trainer, hook)
            call._call_lightning_module_hook(self._trainer, hook)

    def step(self, batches: Iterator[Any]) -> Tensor | None:
        """Make one optimizer step (under manual optimization: one training step), of as many batches as that takes.

        For loops and callbacks each is the first step of the trial again: they see neither steps nor batches pass, so
        nothing that is scheduled comes nearer, and the epoch does not end.

        Args:
            batches: Where to take batches from, each as a loader gives it.

        Returns:
            The mean of this rank's losses; None where no ``training_step`` returned one.
        """
        loop = self._trainer.fit_loop.epoch_loop
        if self._progress is None:
            counters = (loop.batch_progress, loop.scheduler_progress, loop.automatic_optimization.optim_progress)
            self._progress = Snapshot([*counters, loop.manual_optimization.optim_step_progress])
        self._progress.restore()
        self._outputs.losses.clear()
        fetcher: Any = _Batches(batches)
        while True:
            loop.advance(fetcher)
            if not self._module.automatic_optimization or not loop._should_accumulate():
                break
        losses = self._outputs.losses
        if not losses:
            return None
        # Lightning divides each loss by the number of batches in its step
        return torch.stack(losses).sum() if self._module.automatic_optimization else torch.stack(losses).mean()


class _Outputs(Callback):
    """Keeps the losses of a step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(loss.detach().float().mean())


class _Batches:
    """All that the loop over batches asks of what fetches them."""

    done = False  # an epoch never ends here

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __next__(self) -> tuple[Any, int, int]:
        return next(self.batches), 0, 0


@contextmanager
def trial(
    trainer: Trainer, pl_module: LightningModule, *, without: Iterable[Callback] = (), reduces: bool = True
) -> Iterator[Trial]:
    """Run the block on the side of a fit whose module is on its device and wrapped; all of it is undone at its end.

    It takes a second copy of the weights and of the optimizer's state, in the host's memory.

    Args:
        trainer: The Trainer of the fit.
        pl_module: Its module.
        without: Callbacks that take no part, besides those that are not of this package or only observe.
        reduces: Whether DDP reduces gradients over the ranks. A step that ends half-way would leave its wrapper in no
            state to go on.

    Raises:
        MisconfigurationException: If the strategy keeps weights where they can't be put back.
    """
    from torch.distributed.fsdp import FSDPModule  # slow to import

    _check(trainer, pl_module)
    excluded = {id(callback) for callback in without}
    callbacks: list[Callback] = [
        callback
        for callback in trainer_callbacks(trainer)
        if isinstance(callback, AccelCallback)
        and id(callback) not in excluded
        and callback.contract.touches - _OBSERVED
    ]
    plans = {id(callback.plan): callback.plan for callback in callbacks if isinstance(callback, AccelCallback)}
    loaders, strategy = train_loaders(trainer), trainer.strategy
    parts, datasets = loader_parts(loaders)
    datamodule = getattr(trainer, "datamodule", None)
    snapshot = Snapshot(
        [
            *(pl_module, *strategy.optimizers, *strategy._lightning_optimizers, *strategy.lr_scheduler_configs),
            *(trainer.fit_loop, trainer._logger_connector, strategy.precision_plugin, *callbacks),
            getattr(strategy, "_ddp_comm_state", None),
            *parts,
            *_generators(datamodule),
            *_optimizers_in(getattr(pl_module, "configure_optimizers", None)),
        ],
        surfaces=[trainer, strategy, *(() if datamodule is None else (datamodule,))],
        left=[*plans.values(), *datasets],
    )
    random_state = get_rng_state()
    stacks = {id(plan): plan.undo_stack for plan in plans.values() if plan is not None}
    side = Trial(trainer, pl_module, callbacks)
    try:
        for plan in plans.values():
            if plan is not None:
                plan.undo_stack = ExitStack()  # what callbacks change in the trial ends with it
        trainer.__dict__["callbacks"] = [*callbacks, side._outputs]
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]  # a connector sets it
        trainer.fit_loop.epoch_loop.__dict__["update_lr_schedulers"] = _nothing
        if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
            # A wrapper of its own: DDP lays its buckets out anew after its first backward, and with more than two ranks
            # the order of sums follows. The fit's wrapper passes over gradients of forwards that are not its own.
            strategy.model = pl_module
            if reduces:
                strategy.configure_ddp()
            else:
                strategy.__dict__["configure_ddp"] = _nothing
        yield side
    finally:
        for plan in plans.values():
            if plan is not None:
                plan.undo_stack.close()
                plan.undo_stack = stacks[id(plan)]
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):  # an exception may have come between gathering and letting go
                module.reshard()
        for kept in reversed(side._kept):
            kept.restore()
        snapshot.restore()
        set_rng_state(random_state)


def before_training(callback: AccelCallback, trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` in this fit when all is restored and its data is set up, before any ``on_train_start``."""

    def on_run_start(original: Callable[[], None]) -> None:
        function()
        original()

    callback.patch(trainer.fit_loop, "on_run_start", on_run_start)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what is not done in a trial."""


def _optimizers_in(function: Any) -> Iterator[Any]:
    """The optimizers and schedulers that a function carries along, as LightningCLI's ``configure_optimizers`` does."""
    if isinstance(function, Patched):
        yield from _optimizers_in(function.original)
    elif isinstance(function, types.MethodType):
        yield from _optimizers_in(function.__func__)
    elif isinstance(function, partial):
        held = (*function.args, *function.keywords.values())
        yield from (item for item in held if hasattr(item, "param_groups") or hasattr(item, "optimizer"))


def _check(trainer: Trainer, pl_module: LightningModule) -> None:
    for cls in type(trainer.strategy).__mro__:
        if cls.__name__ in _UNREACHABLE:
            raise MisconfigurationException(
                f"Training on the side and putting everything back can't work with {type(trainer.strategy).__name__}: "
                f"{_UNREACHABLE[cls.__name__]}. Search under strategy='ddp' or on a single device, and configure what "
                "was found."
            )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "Training on the side can't work with a `training_step` that takes `dataloader_iter`: let it take a batch."
        )


# ------------------------------------------------------------------------------------------------- the training data


def training_batches(trainer: Trainer) -> Iterator[Any]:
    """The fit's training batches without end, in passes of their own: the fit's own iterators stay where they are.

    Use it inside a :func:`trial`, which puts back what samplers and data sets keep.

    Raises:
        MisconfigurationException: If the data can be gone through only once.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        raise RuntimeError("Expected the training data to be set up.")
    own: CombinedLoader = copy.copy(combined)
    own._iterator = None
    own.flattened = [_copy(loader) for loader in combined.flattened]
    while True:
        iter(own)
        empty = True
        try:
            for batch, _, _ in own:
                empty = False
                yield batch
        finally:
            own.reset()  # ends the workers
        if empty:
            return


def _copy(loader: Any) -> Any:
    try:
        own = copy.copy(loader)
    except TypeError as error:
        raise MisconfigurationException(
            f"The training data is a {type(loader).__name__}, which can be gone through only once: batches that are "
            "tried would be lost to the fit. Give `fit` a DataLoader, or an object whose `__iter__` begins anew."
        ) from error
    if isinstance(own, DataLoader):
        own._iterator = None  # persistent workers belong to the fit
        if isinstance(own.dataset, IterableDataset):
            vars(own)["dataset"] = copy.copy(own.dataset)
    return own


def loader_parts(loaders: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """What changes in loaders when they are gone through, and the data sets inside them, which are left alone."""
    loaders = list(loaders)
    parts = [part for loader in loaders for part in _parts(loader)]
    return parts, [dataset for loader in loaders for dataset in _datasets(loader)]


def _datasets(loader: Any) -> Iterator[Any]:
    dataset = getattr(loader, "dataset", None)
    while dataset is not None:
        yield dataset
        dataset = getattr(dataset, "dataset", None)  # of a subset


def _parts(loader: Any) -> Iterator[Any]:
    """What changes in a loader when it is gone through: samplers, its place where it is watched, random generators."""
    for owner in (loader, *_datasets(loader)):
        yield from _generators(owner)
    if isinstance(loader, DataLoader):
        yield from (value for name, value in vars(loader).items() if name not in ("dataset", "collate_fn"))


def _generators(owner: object) -> Iterator[Any]:
    for value in getattr(owner, "__dict__", {}).values():
        if isinstance(value, (torch.Generator, random.Random)) or hasattr(value, "bit_generator"):
            yield value
