"""Modules and data that `lightning-accel plan` meets: tests name them in YAML."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Net(LightningModule):
    """Four repeated layers of more than a million parameters each, the last of them frozen."""

    def __init__(self, width: int = 512, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) for _ in range(depth))
        )
        self.layers[-1].requires_grad_(False)
        self.register_buffer("table", torch.zeros(1000))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch
        return self.layers(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class RealWork(Net):
    """Reads values while it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [float(rate) for rate in torch.linspace(0, 1, 4)]


class NoStep(LightningModule):
    """Has no training_step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))])


class TwoOptimizers(Net):
    """As for a GAN."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(layer.parameters()) for layer in self.layers[:2]]


class WithLBFGS(Net):
    """An optimizer whose state grows."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


class WithAdafactor(Net):
    """An optimizer that FSDP2 refuses."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(self.parameters())


class Broken(Net):
    """Fails while it is made."""

    def __init__(self) -> None:
        super().__init__()
        raise ValueError("nothing works")


class Data(LightningDataModule):
    """Batches of dictionaries, of data that would first have to be downloaded."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.width = width

    def prepare_data(self) -> None:
        raise AssertionError("it downloads")

    def train_dataloader(self) -> DataLoader:
        return DataLoader([{"x": torch.ones(self.width)}] * 64, batch_size=16)


class Missing(Data):
    """The same where the data is not there."""

    def setup(self, stage: str) -> None:
        raise FileNotFoundError("no data/train.bin")
