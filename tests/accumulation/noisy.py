"""A gradient whose noise is known: each sample's is a fixed vector plus noise of a known size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conformance.toy import make_trainer

DIMENSIONS = 40


def noise_data(samples: int, scale: float, seed: int = 0, signal: float = 2.0) -> TensorDataset:
    """Gradients of samples, with tr(Sigma) / |G|^2 = ``scale`` samples."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.full((DIMENSIONS,), math.sqrt(signal / DIMENSIONS))
    sigma = math.sqrt(scale * signal / DIMENSIONS)
    return TensorDataset(true + sigma * torch.randn(samples, DIMENSIONS, generator=generator))


def noise_loader(batches: int, scale: float, size: int = 4, **arguments: Any) -> DataLoader[Any]:
    """Batches of ``size`` samples whose noise scale is ``scale`` batches."""
    return DataLoader(noise_data(batches * size, scale * size, **arguments), batch_size=size)


class Noisy(LightningModule):
    """Its gradient is the mean of what is in the batch, wherever its weights are."""

    def __init__(self, configure: Callable[[Noisy], Any] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIMENSIONS // 4))
        self.matrix = nn.Parameter(torch.zeros(3, DIMENSIONS // 4))
        self.configure = configure
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch[0].split(DIMENSIONS // 4, dim=1)
        loss = (parts[0] @ self.weight).mean()
        for part, row in zip(parts[1:], self.matrix, strict=True):
            loss = loss + (part @ row).mean()
        return loss

    def configure_optimizers(self) -> Any:
        return self.configure(self) if self.configure else torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(module: LightningModule, *callbacks: Any, data: Any, ckpt_path: Any = None, **arguments: Any) -> Any:
    arguments = {"max_epochs": 1, "enable_checkpointing": False, "val_check_interval": None, **arguments}
    trainer = make_trainer(callbacks, **arguments)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer
