"""A module of five weights, its data, a Trainer that prints nothing, and a callback that writes down the hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_accel.hooks import AccelCallback, Contract
from tests.accelerator import ACCELERATOR

BATCH_SIZE = 4
QUIET: dict[str, Any] = {
    "accelerator": ACCELERATOR,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}


def samples(batches: int) -> TensorDataset:
    generator, count = torch.Generator().manual_seed(1), batches * BATCH_SIZE
    data = torch.randn(200, 5, generator=generator)[:count]
    return TensorDataset(data[:, :4], data[:, 4:])


def loader(batches: int = 5, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(samples(batches), **{"batch_size": BATCH_SIZE, **arguments})


def none_at(*numbers: int, batches: int = 5) -> DataLoader[Any]:
    """A loader whose batches of these numbers (from 0) are ``None``, as a collate function may return for a bad one."""

    def collate(items: list[tuple[Tensor, Tensor]]) -> Any:
        x = torch.stack([item[0] for item in items])
        number = int((all_x[::BATCH_SIZE] == x[0]).all(1).nonzero())
        return None if number in numbers else [x, torch.stack([item[1] for item in items])]

    all_x = samples(batches).tensors[0]
    return loader(batches, collate_fn=collate)


class Stream(IterableDataset[tuple[Tensor, ...]]):
    """The samples without a length."""

    def __init__(self, batches: int = 5) -> None:
        self.samples = samples(batches)

    def __iter__(self) -> Any:
        return iter([self.samples[index] for index in range(len(self.samples))])


def stream(batches: int = 5) -> DataLoader[Any]:
    return DataLoader(Stream(batches), batch_size=BATCH_SIZE)


class Tiny(LightningModule):
    """A linear regression; ``configure`` makes its optimizers, and ``seen`` keeps what training_step was given."""

    def __init__(self, configure: Callable[[Tiny], Any] | None = None, lr: float = 0.1) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.1, -0.2, 0.3, -0.4]]))
            self.layer.bias.zero_()
        self.configure = configure
        self.lr = lr
        self.seen: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return ((self.layer(x) - y) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch[0].detach().clone())
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        if self.configure is not None:
            return self.configure(self)
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Validated(Tiny):
    """The same with validation and test; ``evaluated`` keeps what they were given."""

    def __init__(self, configure: Callable[[Tiny], Any] | None = None) -> None:
        super().__init__(configure)
        self.evaluated: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch[0].detach().clone())
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(batch[0].detach().clone())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.evaluated.append(batch[0].detach().clone())
        return batch[1]


class Data(LightningDataModule):
    """Owns the batch-transfer hook, and leaves a mark in it."""

    def __init__(self, batches: int = 5) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.batches)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 100, batch[1]]


def make_trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    if arguments.pop("barebones", False):
        return Trainer(barebones=True, accelerator=ACCELERATOR, callbacks=list(callbacks), **arguments)
    return Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 1, **arguments})


def fit(
    module: LightningModule, *callbacks: Callback, data: Any = None, ckpt_path: Any = None, **arguments: Any
) -> Any:
    """Fit and return the Trainer."""
    trainer = make_trainer(*callbacks, **arguments)
    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer


def contract(**changes: Any) -> Contract:
    fields: dict[str, Any] = {"purpose": "Do nothing.", "touches": frozenset(), "acts": "never", "expects": "nothing"}
    return Contract(**{**fields, "docs": "methods/none", **changes})


def callback_class(name: str, base: type[AccelCallback] = AccelCallback, **changes: Any) -> type[Any]:
    """A callback class of its own with a contract of its own."""
    return type(name, (base,), {"contract": contract(**changes)})


class Stop(Exception):
    """Raised by tests to break a fit."""


class At(Callback):
    """Runs a function in one hook; ``on`` picks the calls, counted from 0."""

    def __init__(self, hook: str, function: Callable[..., Any], on: int | None = None) -> None:
        self.calls = 0

        def call(trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
            self.calls += 1
            if on is None or on == self.calls - 1:
                function(trainer, pl_module)

        setattr(self, hook, call)


def stop_at(hook: str, on: int | None = None, error: BaseException | None = None) -> At:
    def stop(trainer: Trainer, pl_module: LightningModule) -> None:
        raise error or Stop

    return At(hook, stop, on)


def save_at(hook: str, path: Any, on: int | None = None) -> At:
    return At(hook, lambda trainer, _: trainer.save_checkpoint(path), on)
