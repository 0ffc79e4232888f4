"""Where a fit is, its training data, and how to go on from there: the private names that exact resuming needs.

Lightning saves how many epochs and batches began and ended, and a resumed loop guesses from these where it was.
Between a batch's end and the validation that was due, between an epoch's last batch and its end, and in a fit with
``max_steps``, it guesses wrong: it leaves out validation and the epoch's end, repeats a batch, or ends the next epoch
at once. Here the place is named when it is saved (:func:`place`), and the counters are settled before the loop reads
them (:func:`settle`), so that the loop goes on at exactly that place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_accel.hooks.callback import AccelCallback

__all__ = [
    "EPOCH_BOUNDARY",
    "batches_unused",
    "callback_metrics",
    "go_on_from",
    "is_stateful",
    "load_data_again",
    "load_partial_gradients",
    "on_fit_goes_on",
    "on_loaders_ready",
    "on_validation_loaders_ready",
    "partial_gradients",
    "place",
    "reload_epochs",
    "saved_loader_states",
    "set_reload_epochs",
    "set_sampler_epochs",
    "set_saved_loader_states",
    "settle",
    "stateful_loaders",
    "train_loaders",
    "validation_loaders",
    "window_is_open",
]

EPOCH_BOUNDARY = frozenset({"epoch_start", "epoch_end", "end"})
"""The places between two epochs: what comes next is a new pass over the training data."""


def place(trainer: Trainer) -> str:
    """Name the place in the fit where the Trainer is.

    Returns:
        ``"start"``: before the first batch; ``"epoch_start"``: in the hooks before a later epoch; ``"batch"``: inside a
        batch; ``"batch_end"``: in its ``on_train_batch_end``; ``"validation"`` and ``"validation_end"``: inside
        validation and in its last hooks; ``"between"``: between two batches; ``"stopped"``: after training ended in the
        middle of an epoch; ``"epoch_end"``: in ``on_train_epoch_end``; ``"end"``: after it.
    """
    loop = trainer.fit_loop.epoch_loop
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = loop.batch_progress.current
    validation = loop.val_loop.batch_progress
    if epoch.ready == epoch.processed:
        if epoch.ready == 0:
            return "start"
        if batch.completed == batch.ready and not loop._num_ready_batches_reached():
            return "stopped"
        return "end" if epoch.completed == epoch.processed else "epoch_end"
    if epoch.started < epoch.ready:
        return "start" if epoch.ready == 1 else "epoch_start"
    if batch.processed < batch.ready:
        return "batch"
    if batch.completed < batch.processed:
        return "batch_end"
    if trainer.validating:
        ended = validation.is_last_batch and validation.current.completed == validation.current.ready
        return "validation_end" if ended else "validation"
    return "between"


def settle(trainer: Trainer, where: str) -> None:
    """Set the restored counters so that the fit goes on at ``where``; call it when the training data is set up."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs: list[Any] = [fit.epoch_progress.total, fit.epoch_progress.current]
    batches: list[Any] = [loop.batch_progress.total, loop.batch_progress.current]
    validation: Any = loop.val_loop.batch_progress.total
    for epoch in epochs:
        if where in ("start", "epoch_start"):
            epoch.ready = epoch.started = epoch.completed
        elif where == "stopped":
            epoch.processed = epoch.completed = epoch.ready - 1
    for batch in batches:
        if where == "batch":
            batch.ready = batch.started = batch.processed = batch.completed
        elif where == "batch_end":
            batch.completed = batch.processed
    if where == "batch":
        loop.batch_progress.is_last_batch = False
    if where == "validation":
        validation.ready = validation.started = validation.processed = validation.completed
    if where == "epoch_end":
        # Lightning does this after the hooks in which the checkpoint was taken, and not when it resumes there
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    if where in EPOCH_BOUNDARY or where == "start":
        for epoch in epochs:
            epoch.completed = epoch.processed
        _stop_restarting(trainer)
    else:
        fit.restarting = True  # in an epoch of which nothing is announced again


def go_on_from(callback: AccelCallback, trainer: Trainer, where: str) -> None:
    """Let the first turn of the loop over batches go on at ``where``; call it after :func:`settle`."""
    if where in EPOCH_BOUNDARY or where == "start":
        return
    loop = trainer.fit_loop.epoch_loop
    waiting = [where]

    def advance(original: Callable[..., None], data_fetcher: Any) -> None:
        if not waiting:
            original(data_fetcher)
            return
        waiting.clear()
        _stop_restarting(trainer)
        if where in ("batch_end", "validation", "validation_end"):
            loop._skip_next_val = where == "validation_end"
            return  # to what comes after a batch: validation where it is due
        if loop._num_ready_batches_reached():
            raise StopIteration
        original(data_fetcher)

    callback.patch(loop, "advance", advance)


def _stop_restarting(trainer: Trainer) -> None:
    # not by its setter, which keeps a fit with `max_steps` restarting
    trainer.fit_loop._restarting = False
    trainer.fit_loop.epoch_loop.restarting = False


def window_is_open(trainer: Trainer) -> bool:
    """Whether gradients of this batch wait for those of the next ones before the optimizer steps."""
    return trainer.fit_loop._should_accumulate()


def partial_gradients(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    """Copies, on the CPU, of this rank's gradients that no optimizer step has used yet, by parameter.

    A strategy that keeps them elsewhere than in ``parameter.grad`` has a method of this name.
    """
    if (own := getattr(trainer.strategy, "partial_gradients", None)) is not None:
        return own()  # type: ignore[no-any-return]
    return {
        name: parameter.grad.detach().cpu().clone()
        for name, parameter in pl_module.named_parameters()
        if parameter.grad is not None
    }


def load_partial_gradients(trainer: Trainer, pl_module: LightningModule, gradients: Mapping[str, Tensor]) -> None:
    """Put back what :func:`partial_gradients` gave."""
    if (own := getattr(trainer.strategy, "load_partial_gradients", None)) is not None:
        own(gradients)
    else:
        for name, parameter in pl_module.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)
    if gradients.keys() - partial_gradients(trainer, pl_module).keys():
        rank_zero_warn(
            "The checkpoint has gradients of an unfinished accumulation window that this strategy can't take up: the "
            "window goes on without them. Resume with the strategy that saved it to go on exactly."
        )


def callback_metrics(trainer: Trainer) -> dict[str, Any]:
    """The metrics that callbacks and schedulers monitor; the Trainer's own dict, to be updated in place."""
    return trainer.callback_metrics


# ------------------------------------------------------------------------------------------------- the training data


def train_loaders(trainer: Trainer) -> list[Any]:
    """The training loaders as the Trainer uses them, or nothing before they are set up."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def validation_loaders(trainer: Trainer) -> list[Any]:
    """The validation loaders of the fit, or nothing before they are set up."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return [] if combined is None else combined.flattened


def batches_unused(trainer: Trainer) -> int:
    """How many batches were fetched ahead of the loop, as Lightning does where it does not know the data's length."""
    return len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))


def is_stateful(loader: object) -> bool:
    """Whether Lightning saves and restores ``loader`` by itself."""
    return isinstance(loader, _Stateful)


def stateful_loaders(trainer: Trainer, own: Callable[[object], bool]) -> list[Any]:
    """The training loaders that keep their own state, but for those that only seem to because they are our ``own``."""
    return [loader for loader in train_loaders(trainer) if is_stateful(loader) and not own(loader)]


def set_saved_loader_states(checkpoint: dict[str, Any], states: list[Any]) -> None:
    """Replace the states of the training loaders in a checkpoint that is about to be saved."""
    fit_loop = checkpoint["loops"]["fit_loop"]["state_dict"]
    fit_loop.pop("combined_loader", None)
    if states:
        fit_loop["combined_loader"] = states


def saved_loader_states(trainer: Trainer) -> list[Any]:
    """Take over from Lightning the states of the training loaders that a checkpoint has: those of rank 0."""
    states = trainer.fit_loop._combined_loader_states_to_load
    trainer.fit_loop._combined_loader_states_to_load = []
    return states


def on_loaders_ready(callback: AccelCallback, trainer: Trainer, call: Callable[[Callable[[], None]], None]) -> None:
    """Call ``call(original)`` when the training loaders are final and about to be iterated for the first time.

    At the start of the fit and at each reload. ``original`` loads the states of stateful loaders.
    """
    callback.patch(trainer.fit_loop, "_load_combined_loader_states", call)


def load_data_again(trainer: Trainer) -> None:
    """Let the fit set up its training data once more, where that was done before the counters were restored.

    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` does it, to count the batches.
    """
    for loader in train_loaders(trainer):
        if getattr(loader, "_iterator", None) is not None:  # persistent workers would go on with their old order
            loader._iterator = None
    trainer.fit_loop._combined_loader = None


def on_validation_loaders_ready(callback: AccelCallback, trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` each time the fit has made sure that its validation loaders are set up."""

    def setup_data(original: Callable[[], None]) -> None:
        original()
        if not trainer.sanity_checking:
            function()

    callback.patch(trainer.fit_loop.epoch_loop.val_loop, "setup_data", setup_data)


def on_fit_goes_on(callback: AccelCallback, trainer: Trainer, function: Callable[[], None]) -> None:
    """Call ``function`` once, after every ``on_train_start`` and before anything of the first epoch."""
    waiting = [function]

    def on_advance_start(original: Callable[[], None]) -> None:
        while waiting:
            waiting.pop()()
            # Lightning makes no second iterator when it resumes. At an epoch's start there must be one: the first was
            # made too early, before the hooks and the random state that belong before it.
            trainer.fit_loop._resuming_from_checkpoint = False
        original()

    callback.patch(trainer.fit_loop, "on_advance_start", on_advance_start)


def set_sampler_epochs(trainer: Trainer) -> None:
    """Tell the samplers the epoch before they are iterated; Lightning does so after workers have drawn from them."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    for loader in train_loaders(trainer):
        _set_sampler_epoch(loader, epoch.processed)


def reload_epochs(trainer: Trainer) -> list[float]:
    """The epochs at which the training and the validation loaders were last loaded, for ``reload_dataloaders_...``."""
    loop = trainer.fit_loop.epoch_loop
    return [float(trainer.fit_loop._last_train_dl_reload_epoch), float(loop.val_loop._last_val_dl_reload_epoch)]


def set_reload_epochs(trainer: Trainer, epochs: list[float]) -> None:
    """Set what :func:`reload_epochs` read."""
    training, validation = (epoch if math.isinf(epoch) else int(epoch) for epoch in epochs)
    trainer.fit_loop._last_train_dl_reload_epoch = training
    trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = validation
