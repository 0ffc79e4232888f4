"""The batch size of the training data, read from its loaders and set from outside, and where it can still be set.

A loader is not made again from its arguments, which not every loader keeps: a shallow copy of it has the same data set,
sampler, collate function, workers and generator, and batches of another size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel.hooks.callback import AccelCallback

__all__ = [
    "batch_size_of",
    "before_optimizers",
    "fetched_batches",
    "first_dimension",
    "on_each_train_loader",
    "release_train_data",
    "samples_in",
    "set_batch_size_attribute",
    "set_up_train_data",
    "why_no_batch_size",
    "with_batch_size",
]


def batch_size_of(loader: object) -> int | None:
    """The batch size of a loader; None where it does not say."""
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def why_no_batch_size(loader: object) -> str:
    """Why the batch size of a loader can't be set from outside; empty where it can."""
    if not isinstance(loader, DataLoader):
        return f"the training data is a {type(loader).__name__}, which is no DataLoader"
    if loader.batch_sampler is None:
        return "its DataLoader has batch_size=None, so the data set makes the batches itself"
    if batch_size_of(loader) is None:
        return f"{type(loader.batch_sampler).__name__} has no attribute `batch_size`, an int, that its batches follow"
    return ""


def with_batch_size(loader: DataLoader[Any], size: int) -> DataLoader[Any]:
    """A copy of a loader, not iterated yet, whose batches have ``size`` samples."""
    own, sampler = copy.copy(loader), copy.copy(loader.batch_sampler)
    own._iterator = None
    sampler.batch_size = size  # type: ignore[union-attr]
    vars(own)["batch_sampler"] = sampler  # a DataLoader forbids to set these
    if own.batch_size is not None:
        vars(own)["batch_size"] = size
    return own


def samples_in(loader: DataLoader[Any]) -> int | None:
    """How many samples this rank has in an epoch; None where that is unknown."""
    stream = isinstance(loader.dataset, IterableDataset)
    source = loader.dataset if stream else getattr(loader.batch_sampler, "sampler", loader.sampler)
    try:
        return len(source)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def on_each_train_loader(callback: AccelCallback, trainer: Trainer, change: Callable[[Any], Any]) -> None:
    """Let the fit train with what ``change`` makes of each training loader, whenever they are loaded.

    It gets them with the sampler that Lightning gives them on several ranks.
    """
    source: Any = trainer.fit_loop._data_source

    def dataloader(original: Callable[[], Any]) -> Any:
        loaders = original()  # Lightning puts loaders into a CombinedLoader; not into the user's
        return copy.copy(loaders) if isinstance(loaders, CombinedLoader) else loaders

    def prepare(original: Callable[..., Any], loader: Any, shuffle: bool, mode: RunningStage) -> Any:
        prepared = original(loader, shuffle=shuffle, mode=mode)
        return change(prepared) if mode == RunningStage.TRAINING else prepared

    callback.patch(source, "dataloader", dataloader)
    callback.patch(trainer._data_connector, "_prepare_dataloader", prepare)


def before_optimizers(
    callback: AccelCallback, trainer: Trainer, function: Callable[[Callable[[], None]], None]
) -> None:
    """Call ``function(make)`` where the optimizers are about to be made; ``make`` makes them.

    The module is on its device then, and wrapped, and a checkpoint's callbacks are restored (but under strategies that
    do it late). What optimizers and schedulers depend on, such as the number of batches, can still change.
    """

    def setup_optimizers(original: Callable[[Trainer], None], trainer: Trainer) -> None:
        function(partial(original, trainer))

    callback.patch(trainer.strategy, "setup_optimizers", setup_optimizers)


def set_up_train_data(trainer: Trainer) -> None:
    """Load the training data of the fit, anew where that was done before."""
    release_train_data(trainer)
    trainer.fit_loop.setup_data()


def release_train_data(trainer: Trainer) -> None:
    """End the workers of the training data, and let go of it."""
    if trainer.fit_loop._data_fetcher is not None:
        trainer.fit_loop._data_fetcher.teardown()
    trainer.fit_loop._combined_loader = trainer.fit_loop._data_fetcher = None


def fetched_batches(trainer: Trainer) -> Iterator[Any]:
    """The batches that the fit's own iterator gives, pass after pass, until one has none."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    while True:
        empty = True
        while (item := next(fetcher, None)) is not None:
            empty = False
            yield item[0]
        if empty:
            return
        iter(fetcher)


def first_dimension(batch: Any) -> int:
    """The longest first dimension of a batch's tensors, which no number of samples is above."""
    leaves = tree_leaves(batch)
    return max((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), default=0)


def set_batch_size_attribute(trainer: Trainer, pl_module: LightningModule, name: str, size: int) -> Callable[[], None]:
    """Set the attribute or hyperparameter that has the batch size, wherever module and datamodule have it.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        name: Its name.
        size: The value.

    Returns:
        A function that puts the old values back.
    """
    undo: list[Callable[[], Any]] = []
    for owner in (pl_module, getattr(trainer, "datamodule", None)):
        if owner is None:
            continue
        if isinstance(vars(owner).get(name), int):
            undo.append(partial(setattr, owner, name, vars(owner)[name]))
            setattr(owner, name, size)
        if name in (hparams := getattr(owner, "_hparams", {})):
            undo.append(partial(hparams.__setitem__, name, hparams[name]))
            hparams[name] = size

    def put_back() -> None:
        for function in undo:
            function()

    return put_back
