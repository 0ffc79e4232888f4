"""What `hooks/data.py` relies on in Lightning and PyTorch: each test fails when they change it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_accel import ExactResume
from lightning_accel.hooks import data
from tests.durability.runs import Net, fit, loader


class Note(Callback):
    """Calls a function in the named hooks and keeps what it returns."""

    def __init__(self, hooks: str, look: Any) -> None:
        self.found: list[Any] = []
        for hook in hooks.split():
            setattr(self, hook, lambda trainer, *_, hook=hook: self.found.append((hook, look(trainer))))


def names(note: Note) -> list[str]:
    """The places that were found, without repetition."""
    found = [place for _, place in note.found]
    return [place for i, place in enumerate(found) if i == 0 or found[i - 1] != place]


ALL_HOOKS = (
    "on_train_start on_train_epoch_start on_train_batch_start on_train_batch_end on_validation_start "
    "on_validation_batch_end on_validation_epoch_end on_validation_end on_train_epoch_end on_train_end"
)


def test_every_place_has_its_name() -> None:
    note = Note(ALL_HOOKS, data.place)
    fit([note], loader, max_epochs=2, limit_train_batches=2, val_check_interval=1)
    batch = ["batch", "batch_end", "validation", "validation_end"]
    assert names(note) == ["start", *batch, *batch, "epoch_end", "epoch_start", *batch, *batch, "epoch_end", "end"]


def test_training_that_stopped_in_mid_epoch_has_its_name() -> None:
    note = Note("on_train_epoch_end on_train_end", data.place)
    fit([note], loader, max_steps=3)
    assert names(note) == ["stopped"]


def counters(trainer: Trainer) -> tuple[Any, ...]:
    loop = trainer.fit_loop
    return tuple(
        (tracker.ready, tracker.started, tracker.processed, tracker.completed)
        for progress in (loop.epoch_progress, loop.epoch_loop.batch_progress)
        for tracker in (progress.total, progress.current)
    )


class SaveAt(Callback):
    def __init__(self, hook: str, batch: int) -> None:
        self.hook, self.batch = hook, batch
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint("a.ckpt")


def resumed_plainly(hook: str, batch: int, hooks: str, **options: Any) -> list[str]:
    fit([SaveAt(hook, batch)], loader, **options)
    note = Note(hooks, lambda trainer: None)
    with pytest.warns(UserWarning, match="is not resumable") if batch % 6 != 5 else nothing():
        fit([note], loader, resume=Path("a.ckpt"), **options)
    return [hook for hook, _ in note.found]


class nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_lightning_leaves_out_what_was_due_after_an_epochs_last_batch() -> None:
    """Why `settle` and `go_on_from` exist: with them the validation and the epoch's end come."""
    hooks = "on_validation_start on_train_epoch_end"
    assert resumed_plainly("on_train_batch_end", 5, hooks, max_epochs=2) == [
        "on_validation_start",
        "on_train_epoch_end",
    ]
    fit([SaveAt("on_train_batch_end", 5), ExactResume()], loader, max_epochs=2)
    note = Note(hooks, lambda trainer: None)
    fit([note, ExactResume()], loader, resume=Path("a.ckpt"), max_epochs=2)
    assert [hook for hook, _ in note.found] == ["on_validation_start", "on_train_epoch_end"] * 2


def test_lightning_leaves_out_a_validation_that_was_due_in_mid_epoch() -> None:
    options = {"max_epochs": 1, "val_check_interval": 3}
    assert resumed_plainly("on_train_batch_end", 2, "on_validation_start", **options) == ["on_validation_start"]


def test_lightning_keeps_a_fit_with_max_steps_restarting() -> None:
    """Why `restarting` is not set by its setter."""
    trainer = Trainer(max_steps=3, logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.fit_loop.restarting = False
    assert trainer.fit_loop.restarting


def test_the_hook_where_loaders_are_final_comes_before_their_first_iteration() -> None:
    order: list[str] = []

    class Loader(DataLoader):
        def __iter__(self) -> Iterator[Any]:
            order.append("iter")
            return super().__iter__()

    class Watch(Callback):
        def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            original = trainer.fit_loop._load_combined_loader_states

            def ready() -> None:
                order.append(type(data.train_loaders(trainer)[0]).__name__)
                original()

            trainer.fit_loop._load_combined_loader_states = ready

        def on_train_start(self, *_: Any) -> None:
            order.append("on_train_start")

        def on_train_epoch_start(self, *_: Any) -> None:
            order.append("on_train_epoch_start")

    fit([Watch()], lambda: Loader(loader().dataset, batch_size=4), max_epochs=2, validation=None)
    first = ["Loader", "iter", "on_train_start", "on_train_epoch_start"]
    assert order == [*first, "on_train_epoch_start", "iter"], "a later epoch's iterator comes after its start"


def test_what_lightning_calls_stateful() -> None:
    class Keeps:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    assert isinstance(Keeps(), _Stateful) and data.is_stateful(Keeps()) and not data.is_stateful(loader())


def test_where_a_checkpoint_keeps_the_states_of_loaders() -> None:
    class Keeps(DataLoader):
        def state_dict(self) -> dict[str, Any]:
            return {"mine": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    fit([SaveAt("on_train_batch_end", 1)], lambda: Keeps(loader().dataset, batch_size=4), max_epochs=1)
    checkpoint = torch.load("a.ckpt", weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"mine": 1}]
    data.set_saved_loader_states(checkpoint, [])
    assert "combined_loader" not in checkpoint["loops"]["fit_loop"]["state_dict"]
    data.set_saved_loader_states(checkpoint, [{"other": 2}])
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"other": 2}]


def test_workers_draw_from_a_sampler_before_lightning_sets_its_epoch() -> None:
    """Why `set_sampler_epochs` exists: with two workers, a resumed run has the order of epoch 0 without it."""
    epochs: list[int] = []

    class Sampler(DistributedSampler):
        def __iter__(self) -> Iterator[int]:
            epochs.append(self.epoch)
            return super().__iter__()

    def make() -> DataLoader:
        return loader(2, sampler=Sampler(loader().dataset, num_replicas=2, rank=0))

    fit([SaveAt("on_train_batch_end", 4)], make, max_epochs=3, validation=None)
    del epochs[:]
    with pytest.warns(UserWarning, match="is not resumable"):
        fit([], make, resume=Path("a.ckpt"), max_epochs=3, validation=None)
    assert epochs[0] == 0 and epochs[-1] == 2


def test_an_open_window() -> None:
    note = Note("on_train_batch_end", data.window_is_open)
    fit([note], loader, max_epochs=1, accumulate_grad_batches=4, validation=None)
    assert [is_open for _, is_open in note.found] == [True, True, True, False, True, False]


def test_callback_metrics_can_be_updated_in_place() -> None:
    def add(trainer: Trainer) -> bool:
        data.callback_metrics(trainer)["mine"] = torch.tensor(2.0)
        return "mine" in trainer.callback_metrics

    note = Note("on_train_batch_end", add)
    trainer, _ = fit([note], loader, max_epochs=1)
    assert all(added for _, added in note.found) and trainer.callback_metrics["mine"] == 2


def test_a_batch_is_fetched_ahead_where_the_length_is_unknown() -> None:
    class Endless(torch.utils.data.Sampler):
        def __iter__(self) -> Iterator[int]:
            return iter(range(12))

    note = Note("on_train_batch_end", data.batches_unused)
    fit([note], lambda: loader(sampler=Endless()), max_epochs=1, validation=None)
    assert [unused for _, unused in note.found] == [1, 1, 0]


def test_when_loaders_were_loaded() -> None:
    note = Note("on_train_epoch_start", data.reload_epochs)
    fit([note], loader, max_epochs=4, reload_dataloaders_every_n_epochs=2)
    assert [training for _, (training, _) in note.found] == [0, 0, 2, 2]


def test_no_loaders_before_there_are_any() -> None:
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    assert data.train_loaders(trainer) == data.validation_loaders(trainer) == []


def test_gradients_are_cleared_before_the_fit_loop_runs() -> None:
    """Why partial gradients are put back as late as they are."""
    module = Net()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    note = Note("on_train_start", lambda trainer: [p.grad for p in trainer.lightning_module.parameters()])
    fit([note], loader, net=lambda: module, max_epochs=1, limit_train_batches=1)
    assert all(gradient is None for gradient in note.found[0][1])
