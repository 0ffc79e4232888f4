"""Small runs for the tests of exact resuming: a module that draws random numbers everywhere, and how to compare."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_accel import ExactResume
from tests.conftest import WEIGHTS_ONLY

SAMPLES = 22
BATCH = 4  # six batches an epoch, the last of two samples


class Samples(Dataset):
    """Sample i is drawn from seed i; with ``noisy`` a random number of this process is added."""

    def __init__(self, size: int = SAMPLES, noisy: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(size, 5, generator=generator)
        self.noisy = noisy
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.loaded += 1
        x = self.x[index]
        if self.noisy:
            x = x + 0.1 * torch.randn(5) + 0.01 * random.random() + 0.01 * float(np.random.rand())
        return x, torch.tensor(index)


class Net(LightningModule):
    """Dropout, batch norm, and a schedule; it keeps the sample numbers of every training batch."""

    def __init__(self, scheduler: str = "one_cycle", total_steps: int = 40, val_noise: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.scheduler, self.total_steps, self.val_noise = scheduler, total_steps, val_noise
        self.seen: list[list[int]] = []

    def loss(self, batch: Any) -> torch.Tensor:
        if isinstance(batch, dict):
            return sum((self.loss(part) for part in batch.values() if part is not None), torch.zeros(()))
        x, index = batch
        if self.training:
            self.seen.append(index.tolist())
        return ((self.layers(x).squeeze(1) - torch.sin(index.float())) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noise = 0.1 * torch.rand(()) if self.val_noise else 0.0
        self.log("val_loss", self.loss(batch) + noise)

    def on_train_epoch_start(self) -> None:
        torch.rand(3)  # what a user may draw between the end of an epoch and the shuffle of the next

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        if self.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SaveEverywhere(Callback):
    """Saves a checkpoint each time that one of these hooks is called in the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def save(self, trainer: Trainer, hook: str) -> None:
        if not trainer.sanity_checking:
            self.paths.append(self.folder / f"{len(self.paths):03d}-{hook}.ckpt")
            trainer.save_checkpoint(self.paths[-1])

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "on_train_start")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "on_train_epoch_start")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "on_train_batch_end")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "on_train_epoch_end")


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def loader(workers: int = 0, noisy: bool = False, size: int = SAMPLES, **options: Any) -> DataLoader:
    options.setdefault("shuffle", "sampler" not in options and "batch_sampler" not in options)
    if "batch_sampler" not in options:
        options.setdefault("batch_size", BATCH)
    return DataLoader(Samples(size, noisy), num_workers=workers, **options)


def fit(
    callbacks: list[Callback],
    data: Callable[[], Any],
    net: Callable[[], Net] = Net,
    *,
    resume: Path | None = None,
    validation: Callable[[], Any] | None = lambda: loader(shuffle=False, size=8),
    **options: Any,
) -> tuple[Trainer, Net]:
    """Fit a new module with a new Trainer and new loaders; a resumed one starts from other random states."""
    seed(0 if resume is None else 4321)
    options.setdefault("max_epochs", 3)
    options.setdefault("num_sanity_val_steps", 0)
    options.setdefault("enable_checkpointing", False)
    if validation is None:
        options["limit_val_batches"] = 0
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )
    module = net()
    loaders = data()
    if isinstance(loaders, LightningDataModule):
        given = {"datamodule": loaders}
    else:
        given = {"train_dataloaders": loaders, "val_dataloaders": (validation or loader)()}
    trainer.fit(module, ckpt_path=resume, **(WEIGHTS_ONLY if resume else {}), **given)
    return trainer, module


def outcome(trainer: Trainer, module: Net) -> dict[str, Any]:
    """Everything that must be the same: weights, optimizer, schedule, and the random states at the end."""
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "random": (random.random(), float(np.random.rand()), torch.rand(1)),
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures are not bit-equal."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} items"]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}[{i}]")]
    return [] if a == b or callable(a) else [f"{path}: {a} and {b}"]


def check_every_checkpoint(
    folder: Path,
    data: Callable[[], Any],
    every: int = 1,
    others: Callable[[], list[Callback]] = list,
    **options: Any,
) -> None:
    """Fit once without and once with ExactResume, saving everywhere; resume from every checkpoint; compare all."""
    trainer, module = fit(others(), data, **options)
    plain = outcome(trainer, module)
    save = SaveEverywhere(folder)
    trainer, saving_module = fit([*others(), ExactResume(), save], data, **options)
    assert differences(plain, outcome(trainer, saving_module)) == [], "the run is not the plain run"
    assert saving_module.seen == module.seen
    for path in save.paths[::every]:
        trainer, resumed = fit([*others(), ExactResume()], data, resume=path, **options)
        found = outcome(trainer, resumed)
        if trainer.global_step == torch.load(path, weights_only=True)["global_step"]:  # nothing was left to train
            found |= {name: plain[name] for name in ("epoch", "random")}
        assert differences(plain, found) == [], path.name
        assert resumed.seen == module.seen[len(module.seen) - len(resumed.seen) :], path.name
