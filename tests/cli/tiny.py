"""A module and data that take a fraction of a second; `fail_seeds` makes some runs crash, `wait` makes them long."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Tiny(LightningModule):
    def __init__(self, fail_seeds: list[int] | None = None, wait: float = 0.0) -> None:
        super().__init__()
        self.fail_seeds, self.wait = fail_seeds or [], wait
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.wait)
        if torch.initial_seed() in self.fail_seeds:
            raise RuntimeError("the disk of dreams is full")
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.layer(batch[0])
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class TinyData(LightningDataModule):
    def __str__(self) -> str:
        return "64 made-up\n  points"

    def loader(self, **options: Any) -> DataLoader[Any]:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(64, 4, generator=draw)
        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader()
