"""Exact resume: a run that was killed goes on, bit for bit, as if nothing had happened.

A Lightning checkpoint has the weights, the optimizer and the counters. It does not have the state of the random number
generators, the position in the training data, the gradients of an unfinished accumulation window, or the metrics that
schedulers monitor; and a resumed loop may leave out a validation or the end of an epoch. This callback adds them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_accel.durability import replay
from lightning_accel.hooks import AccelCallback, Contract, data
from lightning_accel.hooks.resume import gather_states, on_resume_end
from lightning_accel.hooks.rng import get_rng_state, preserved_rng, set_rng_state

__all__ = ["ExactResume"]


class ExactResume(AccelCallback):
    """Put into every checkpoint what a resumed run needs to go on bit for bit.

    With it a checkpoint has, per rank, the states of Python's, NumPy's and torch's random number generators (every CUDA
    device too), the position in the training data, and the partial gradients of an accumulation window. Without a
    resume it changes nothing.

    Map-style DataLoaders go back to their position without loading what was seen; loaders with ``state_dict`` and
    ``load_state_dict`` (torchdata's StatefulDataLoader) keep their position themselves. Where the data can keep none,
    a warning says so at the start of the fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> trainer = Trainer(callbacks=[ExactResume(), ModelCheckpoint(every_n_train_steps=100)])  # doctest: +SKIP
        >>> trainer.fit(model, ckpt_path="last")  # doctest: +SKIP
    """

    contract = Contract(
        purpose="Let a killed run go on bit for bit: random state, data position and partial gradients are saved.",
        touches=frozenset({"random state", "data order"}),
        acts="at every checkpoint, and once when a run is resumed",
        expects="nothing, unless the run is resumed",
        docs="methods/exact_resume",
        reads=frozenset({"gradients"}),
        once=True,
    )

    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[str, Any] | None = None  # from the checkpoint, until it is used
        self._final: dict[str, Any] | None = None  # of the end of the fit, for checkpoints taken after it
        self._window_open = False  # at the end of the last batch
        self._training = False
        self._restored = False  # whether all of the checkpoint is
        self._watched: WeakSet[Any] = WeakSet()

    @property
    def is_neutral(self) -> bool:
        """A run that is not resumed is the plain run bit for bit."""
        return True

    @property
    def is_idle(self) -> bool:
        """It keeps what a checkpoint will need."""
        return False

    # ------------------------------------------------------------------------------------------------------- saving

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the training loaders from the moment when they are set up."""
        self._saved = self._final = None
        self._window_open = self._training = False
        self._restored = False
        self.on_undo(partial(self._leave, trainer, pl_module))
        on_resume_end(self, trainer, partial(self._resume_end, trainer))
        data.on_loaders_ready(self, trainer, partial(self._loaders_ready, trainer, pl_module))

    def _resume_end(self, trainer: Trainer) -> None:
        """Have data set up again that ``configure_optimizers`` had set up too early, to count its batches."""
        self._restored = True
        if self._saved is not None:
            self._unwatch()
            data.load_data_again(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a position whose epoch ended before the loader was asked for another batch."""
        for loader in self._watched:
            replay.forget(loader)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note whether a window is open, for a checkpoint that is taken inside the next batch."""
        self._window_open = data.window_is_open(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the state of the end, since a checkpoint may be saved when the data is gone."""
        self._final, self._training = self._state_of_rank(trainer, pl_module), False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state of every rank to the checkpoint."""
        state = self._state_of_rank(trainer, pl_module) if self._training else self._final
        if state is None:  # nothing was trained
            return
        data.set_saved_loader_states(checkpoint, state["stateful"])
        checkpoint.setdefault("callbacks", {})[self.state_key] = {"ranks": gather_states(trainer, state)}

    def _state_of_rank(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        where, loaders = data.place(trainer), data.train_loaders(trainer)
        unused = data.batches_unused(trainer) + (where == "batch")
        open_window = self._window_open if where == "batch" else data.window_is_open(trainer)
        between_steps = where in data.EPOCH_BOUNDARY or where == "start"
        keeps_gradients = not pl_module.automatic_optimization or (open_window and not between_steps)
        return {
            "where": where,
            "rng": get_rng_state(),
            "positions": None
            if where in data.EPOCH_BOUNDARY
            else [replay.position(loader, unused) for loader in loaders],
            "generators": [replay.generator_states(loader) for loader in loaders],
            "sampler_seeds": [replay.sampler_seeds(loader) for loader in loaders],
            "stateful": [loader.state_dict() for loader in data.stateful_loaders(trainer, own=replay.is_watched)],
            "validation": [
                {"started": getattr(loader, "_iterator", None) is not None, "states": replay.generator_states(loader)}
                for loader in data.validation_loaders(trainer)
            ],
            "reload_epochs": data.reload_epochs(trainer),
            "metrics": {name: value.detach().cpu() for name, value in data.callback_metrics(trainer).items()},
            "gradients": data.partial_gradients(trainer, pl_module) if keeps_gradients else {},
        }

    def _leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training:  # it was interrupted
            self._final, self._training = self._state_of_rank(trainer, pl_module), False
        self._unwatch()

    def _unwatch(self) -> None:
        for loader in self._watched:
            replay.unwatch(loader)
        self._watched.clear()

    # ----------------------------------------------------------------------------------------------------- resuming

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take in what the checkpoint has; it is used when the training data is set up."""
        self._saved = state_dict

    def _loaders_ready(self, trainer: Trainer, pl_module: LightningModule, original: Callable[[], None]) -> None:
        if self._saved is not None and not self._restored:  # the counters are not restored yet: see _resume_end
            original()
            return
        saved, self._saved = self._saved, None
        self._training = True  # from here on there is something to save
        state: dict[str, Any] | None = None
        if saved is not None:
            where = saved["ranks"][0]["where"]
            state = _of_this_rank(trainer, saved["ranks"])
            if state is not None:
                data.callback_metrics(trainer).update(state["metrics"])
            data.settle(trainer, where)
            data.go_on_from(self, trainer, where)
            data.set_sampler_epochs(trainer)
        loaders = data.train_loaders(trainer)
        if state is None:
            original()
        else:
            for loader, seeds in zip(loaders, state["sampler_seeds"], strict=False):
                replay.set_sampler_seeds(loader, seeds)
            state["stateful"] = state["stateful"] or data.saved_loader_states(trainer)
            if where not in data.EPOCH_BOUNDARY:
                _load_stateful(trainer, state["stateful"])
        self._watch(trainer, loaders)
        if state is None:
            return
        if where in ("batch", "validation"):
            rank_zero_warn(
                f"The checkpoint was taken inside a {'training batch' if where == 'batch' else 'validation'}, which "
                "now runs again from its start: the resumed run is not exactly the one that was interrupted."
            )
        if state["positions"] is not None:
            _rewind(loaders, state["positions"])
        data.on_fit_goes_on(self, trainer, partial(self._go_on, trainer, pl_module, state))
        data.on_validation_loaders_ready(self, trainer, partial(_wake_validation, trainer, state["validation"]))

    def _watch(self, trainer: Trainer, loaders: list[Any]) -> None:
        if len({id(loader) for loader in loaders}) < len(loaders):
            rank_zero_warn("ExactResume can't save the position in a loader that is used twice: make two of it.")
        for loader in loaders:
            if data.is_stateful(loader):
                if not _has_length(loader):
                    rank_zero_warn(
                        "ExactResume can't save the position in the training data: the loader has no length, so "
                        "Lightning fetches one batch ahead of the loop, and a run resumed in mid-epoch would leave "
                        "that batch out. Give the dataset a `__len__`."
                    )
                continue
            if reason := replay.why_not_exact(loader):
                rank_zero_warn(
                    f"ExactResume can't save the position in the training data: {reason}. A run resumed in mid-epoch "
                    "would begin it again. Use torchdata's StatefulDataLoader, or a map-style dataset."
                )
            else:
                replay.watch(loader, recording=lambda: trainer.training)
                self._watched.add(loader)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
        data.set_reload_epochs(trainer, state["reload_epochs"])
        _wake_validation(trainer, state["validation"])
        if state["where"] in data.EPOCH_BOUNDARY:
            _load_stateful(trainer, state["stateful"], at_end=True)
        data.load_partial_gradients(trainer, pl_module, state["gradients"])
        self._window_open = bool(state["gradients"])
        for loader, states in zip(data.train_loaders(trainer), state["generators"], strict=False):
            replay.set_generator_states(loader, states)
        set_rng_state(state["rng"])


def _of_this_rank(trainer: Trainer, states: list[dict[str, Any]]) -> dict[str, Any] | None:
    if len(states) == trainer.world_size:
        return states[trainer.global_rank]
    rank_zero_warn(
        f"The checkpoint has the random state and the data position of {len(states)} rank(s), but this run has "
        f"{trainer.world_size}: it goes on with fresh random numbers and a fresh data order, so it is not exactly the "
        "run that was interrupted. Resume with the same number of devices from a checkpoint that was not taken on an "
        "exception to go on exactly."
    )
    return None


def _has_length(loader: Any) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


def _load_stateful(trainer: Trainer, states: list[Any], *, at_end: bool = False) -> None:
    loaders = data.stateful_loaders(trainer, own=replay.is_watched)
    for loader, state in zip(loaders, states, strict=False):
        loader.load_state_dict(state)
        if at_end:
            # The next iterator must begin a new pass, not go on where nothing is left. So the finished pass is taken up
            # here. A StatefulDataLoader does so for `state_dict` too, and drops a pass that it saw end when iterated.
            loader.state_dict()
            if not (isinstance(state, dict) and state.get("_iterator_finished")):
                iter(loader)


def _rewind(loaders: list[Any], positions: list[Any]) -> None:
    known = len(loaders) == len(positions)
    for loader, position in zip(loaders, positions, strict=False):
        known = known and (position is None or replay.rewind(loader, position))
    if not known:
        rank_zero_warn(
            "The training data is not what it was when the checkpoint was saved (other loaders, or another number of "
            "batches), so its order can't be restored: the epoch goes on with a fresh order."
        )


def _wake_validation(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    """Bring the validation loaders where they were: running persistent workers draw no seed when validation begins."""
    loaders = data.validation_loaders(trainer)
    if not loaders:
        return
    for loader, state in zip(loaders, states, strict=False):
        with preserved_rng():
            if state["started"] and getattr(loader, "persistent_workers", False):
                iter(loader)
        replay.set_generator_states(loader, state["states"])
    states.clear()
