"""The resume law and the neutral law of ExactResume: see `runs.check_every_checkpoint`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_accel import ExactResume, GradientAccumulation
from tests.conftest import WEIGHTS_ONLY
from tests.durability.runs import (
    Net,
    Samples,
    SaveEverywhere,
    check_every_checkpoint,
    differences,
    fit,
    loader,
    outcome,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
]


class Groups(Sampler):
    """Draws each batch from NumPy's global generator when it is asked for."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(6):
            yield np.random.randint(0, 22, 4).tolist()


class WithoutLength(Sampler):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(20).tolist())


class OwnIter(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()

    def val_dataloader(self) -> DataLoader:
        return loader(shuffle=False, size=8)


def stateful(workers: int = 0, **options: Any) -> StatefulDataLoader:
    return StatefulDataLoader(Samples(), batch_size=4, shuffle=True, num_workers=workers, **options)


def distributed(workers: int = 0) -> DataLoader:
    return loader(workers, sampler=DistributedSampler(Samples(44), num_replicas=2, rank=1), size=44)


def validation(workers: int = 0, **options: Any) -> DataLoader:
    return loader(workers, size=8, **options)


CASES: dict[str, dict[str, Any]] = {
    "random transforms, accumulation by 2": {"data": lambda: loader(noisy=True), "accumulate_grad_batches": 2},
    "a short last window": {"data": loader, "accumulate_grad_batches": 4, "validation": None},
    "GradientAccumulation": {"data": loader, "others": lambda: [GradientAccumulation({0: 2, 1: 4})], "every": 2},
    "validation twice an epoch, on a metric": {
        "data": loader,
        "val_check_interval": 0.5,
        "net": lambda: Net("plateau"),
    },
    "validation in mid-window": {"data": loader, "val_check_interval": 2, "accumulate_grad_batches": 3},
    "validation every other epoch": {"data": loader, "check_val_every_n_epoch": 2, "max_epochs": 4, "every": 2},
    "validation draws": {
        "data": loader,
        "validation": lambda: validation(shuffle=True, generator=torch.Generator().manual_seed(4)),
        "num_sanity_val_steps": 2,
    },
    "max_steps": {"data": loader, "max_steps": 15, "max_epochs": -1},
    "max_steps, no validation": {"data": loader, "max_steps": 15, "max_epochs": -1, "validation": None},
    "part of the data": {"data": loader, "limit_train_batches": 4, "every": 2},
    "loaders are made anew": {"data": lambda: Data(), "reload_dataloaders_every_n_epochs": 2, "max_epochs": 4},
    "a generator": {"data": lambda: loader(generator=torch.Generator().manual_seed(5)), "every": 2},
    "an unknown length": {"data": lambda: loader(sampler=WithoutLength()), "every": 2},
    "a DistributedSampler": {"data": distributed, "every": 2},
    "a batch sampler": {"data": lambda: loader(batch_sampler=Groups()), "every": 2},
    "a loader with its own __iter__": {"data": lambda: OwnIter(Samples(), batch_size=4, shuffle=True), "every": 2},
    "two loaders, the shorter cycles": {"data": lambda: {"a": loader(), "b": loader(size=10)}},
    "two loaders, the shorter ends": {
        "data": lambda: CombinedLoader({"a": loader(), "b": loader(size=10)}, "max_size"),
        "every": 2,
    },
    "StatefulDataLoader": {"data": stateful},
    "StatefulDataLoader beside a plain one": {"data": lambda: {"a": loader(), "b": stateful()}, "every": 2},
}
WITH_WORKERS: dict[str, dict[str, Any]] = {
    "workers": {"data": lambda: loader(2), "accumulate_grad_batches": 2, "every": 3},
    "persistent workers": {
        "data": lambda: loader(2, persistent_workers=True),
        "validation": lambda: validation(2, shuffle=False, persistent_workers=True),
        "num_sanity_val_steps": 1,
        "every": 3,
    },
    "a DistributedSampler": {"data": lambda: distributed(2), "every": 4},
    "a batch sampler": {"data": lambda: loader(2, batch_sampler=Groups()), "every": 4},
    "StatefulDataLoader": {"data": lambda: stateful(2), "every": 4},
    "StatefulDataLoader, persistent": {"data": lambda: stateful(2, persistent_workers=True), "every": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_from_everywhere(case: str, tmp_path: Path) -> None:
    check_every_checkpoint(tmp_path, **CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", WITH_WORKERS)
def test_resumed_from_everywhere_with_workers(case: str, tmp_path: Path) -> None:
    check_every_checkpoint(tmp_path, **WITH_WORKERS[case])


class StopAt(Callback):
    """Saves at a hook of a batch and, if asked, raises in it."""

    def __init__(self, batch: int, hook: str, path: Path | None = None, raises: bool = False) -> None:
        self.batch, self.path, self.raises = batch, path, raises
        setattr(self, hook, self.act)

    def act(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            if self.path:
                trainer.save_checkpoint(self.path)
            if self.raises:
                raise KeyError("stop")


def test_without_the_callback_a_resume_is_not_exact(tmp_path: Path) -> None:
    """The negative control: what these tests compare is not equal by itself."""
    path = tmp_path / "a.ckpt"
    trainer, module = fit([StopAt(8, "on_train_batch_end", path)], loader)
    with pytest.warns(UserWarning, match="dataloader is not resumable"):
        resumed = fit([], loader, resume=path)
    assert differences(outcome(trainer, module), outcome(*resumed))


@pytest.mark.filterwarnings("ignore:.*ckpt_path")  # of OnExceptionCheckpoint: it looks for its file at each fit
@pytest.mark.parametrize("batch", [7, 11])
def test_a_checkpoint_taken_on_an_exception_between_batches(batch: int, tmp_path: Path) -> None:
    plain = outcome(*fit([], loader, accumulate_grad_batches=2))
    callbacks = [
        ExactResume(),
        StopAt(batch, "on_train_batch_end", raises=True),
        OnExceptionCheckpoint(tmp_path, "stop"),
    ]
    with pytest.raises(KeyError):
        fit(callbacks, loader, accumulate_grad_batches=2, enable_checkpointing=True)
    resumed = fit([ExactResume()], loader, resume=tmp_path / "stop.ckpt", accumulate_grad_batches=2)
    assert differences(plain, outcome(*resumed)) == []


def test_gradients_of_another_strategy_are_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit([ExactResume(), StopAt(8, "on_train_batch_end", path)], loader, accumulate_grad_batches=2)
    checkpoint = torch.load(path, weights_only=True)
    (state,) = checkpoint["callbacks"][ExactResume().state_key]["ranks"]
    assert state["gradients"]
    state["gradients"] = {f"{name} (stage 2)": value for name, value in state["gradients"].items()}
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="gradients of an unfinished accumulation window that this strategy can't"):
        fit([ExactResume()], loader, resume=path, accumulate_grad_batches=2)


@pytest.mark.filterwarnings("ignore:.*ckpt_path")  # of OnExceptionCheckpoint: it looks for its file at each fit
def test_a_checkpoint_taken_inside_a_batch_repeats_it_and_says_so(tmp_path: Path) -> None:
    _, plain = fit([], loader)
    callbacks = [
        ExactResume(),
        StopAt(8, "on_before_backward", raises=True),
        OnExceptionCheckpoint(tmp_path, "stop"),
    ]
    with pytest.raises(KeyError):
        fit(callbacks, loader, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="inside a training batch"):
        trainer, resumed = fit([ExactResume()], loader, resume=tmp_path / "stop.ckpt")
    assert resumed.seen[0] == plain.seen[8]
    assert resumed.seen[:4] == plain.seen[8:12] and len(resumed.seen) == 10
    assert trainer.global_step == 18


def test_a_checkpoint_taken_inside_validation_repeats_it_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit([ExactResume(), StopAt(11, "on_validation_batch_start", path)], loader)
    with pytest.warns(UserWarning, match="inside a validation"):
        trainer, resumed = fit([ExactResume()], loader, resume=path)
    assert len(resumed.seen) == 6 and trainer.global_step == 18
    assert trainer.current_epoch == 3


def test_saved_after_the_fit(tmp_path: Path) -> None:
    """The state is that of the end of training, whatever was drawn since; also where ``max_steps`` ended an epoch."""
    plain = outcome(*fit([], loader, max_epochs=4))
    for options in ({"max_epochs": 2}, {"max_steps": 9}):
        trainer, _ = fit([ExactResume()], loader, **{"max_epochs": 4, **options})
        torch.rand(5)
        trainer.save_checkpoint("end.ckpt")
        resumed = fit([ExactResume()], loader, resume=Path("end.ckpt"), max_epochs=4)
        assert differences(plain, outcome(*resumed)) == [], options


def test_a_checkpoint_resumes_without_the_callback_too(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit([ExactResume(), StopAt(8, "on_train_batch_end", path)], loader)
    with pytest.warns(UserWarning) as caught:
        trainer, _ = fit([], loader, resume=path)
    assert any("ExactResume" in str(warning.message) for warning in caught)
    assert trainer.global_step == 18


def test_a_plain_checkpoint_resumes_with_the_callback(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit([StopAt(8, "on_train_batch_end", path)], loader)
    trainer, _ = fit([ExactResume()], loader, resume=path)
    assert trainer.global_step == 18


def test_another_number_of_ranks_goes_on_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit([ExactResume(), StopAt(8, "on_train_batch_end", path)], loader)
    checkpoint = torch.load(path, weights_only=True)
    key = ExactResume().state_key
    checkpoint["callbacks"][key]["ranks"] *= 2
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match=r"2 rank\(s\), but this run has 1"):
        trainer, _ = fit([ExactResume()], loader, resume=path)
    assert trainer.global_step == 18


@pytest.mark.parametrize("other", [lambda: loader(size=40), lambda: {"a": loader(), "b": loader()}])
def test_other_data_goes_on_with_a_warning(other: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit([ExactResume(), StopAt(2, "on_train_batch_end", path)], loader, max_epochs=1)
    with pytest.warns(UserWarning, match="not what it was"):
        fit([ExactResume()], other, resume=path, max_epochs=1)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(5), torch.tensor(i)) for i in range(8)])


def test_a_stream_without_state_is_warned_about_when_the_fit_begins() -> None:
    with pytest.warns(UserWarning, match=r"`Stream` is an IterableDataset.*StatefulDataLoader"):
        fit([ExactResume()], lambda: DataLoader(Stream(), batch_size=4), max_epochs=1)


def test_a_loader_that_is_used_twice_is_warned_about() -> None:
    def twice() -> Any:
        same = loader()
        return {"a": same, "b": same}

    with pytest.warns(UserWarning, match="used twice"):
        fit([ExactResume()], twice, max_epochs=1)


def test_training_and_validation_may_share_a_loader(tmp_path: Path) -> None:
    shared: list[DataLoader] = []

    def make() -> DataLoader:
        shared[:] = [loader()]
        return shared[0]

    check_every_checkpoint(tmp_path, make, validation=lambda: shared[0], val_check_interval=0.5, max_epochs=2, every=2)


def test_the_loader_is_as_it_was_after_the_fit_and_after_an_exception() -> None:
    data = OwnIter(Samples(), batch_size=4)
    before = dict(vars(data))
    fit([ExactResume()], lambda: data, max_epochs=1)
    assert type(data) is OwnIter and vars(data) == before
    with pytest.raises(KeyError):
        fit([ExactResume(), StopAt(3, "on_train_batch_end", raises=True)], lambda: data, max_epochs=1)
    assert type(data) is OwnIter and vars(data) == before


def test_a_second_fit_of_the_same_trainer(tmp_path: Path) -> None:
    callback, save = ExactResume(), SaveEverywhere(tmp_path)
    trainer, module = fit([callback, save], loader, max_epochs=1)
    path = next(path for path in save.paths if "batch_end" in path.name)
    data = loader()
    trainer.fit(module, data, loader(), ckpt_path=path, **WEIGHTS_ONLY)
    assert trainer.global_step == 6 and type(data) is DataLoader
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data, loader())
    assert trainer.global_step == 12


def test_nothing_is_saved_where_nothing_was_trained(tmp_path: Path) -> None:
    trainer = Trainer(callbacks=[ExactResume()], logger=False, enable_progress_bar=False, accelerator="cpu")
    module = Net(val_noise=False)
    trainer.validate(module, loader(shuffle=False), verbose=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert ExactResume().state_key not in torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]


class Manual(Net):
    """Accumulates by itself: a step every third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization_keeps_its_gradients(tmp_path: Path) -> None:
    check_every_checkpoint(tmp_path, loader, net=Manual, every=2)


def test_gradients_are_saved_in_an_open_window_only(tmp_path: Path) -> None:
    save = SaveEverywhere(tmp_path)
    fit([ExactResume(), save], loader, accumulate_grad_batches=2, max_epochs=1, validation=None)
    key = ExactResume().state_key
    counts = [len(torch.load(path)["callbacks"][key]["ranks"][0]["gradients"]) for path in save.paths]
    batches = [count for path, count in zip(save.paths, counts, strict=True) if "batch_end" in path.name]
    assert [count > 0 for count in batches] == [True, False] * 3
    assert sum(map(bool, counts)) == 3
