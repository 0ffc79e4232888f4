"""A stack of layers whose activations, gradients and state are large enough to be measured on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.conftest import WEIGHTS_ONLY

WIDTH, DEPTH, SAMPLES = 512, 8, 8192
PARAMETERS = DEPTH * WIDTH * (WIDTH + 1)
ACTIVATIONS = 4 * DEPTH * WIDTH * 2
"""Bytes that the backward of one sample needs, at least: the inputs of the layers and what dropout multiplies with."""


class Wide(LightningModule):
    """Layers with dropout."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout)) for _ in range(DEPTH))
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[0].roll(1, 1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Losses(Callback):
    """The loss of each batch, and the most bytes that a batch after the first took above what was there before the fit.

    The first batch is where optimizers make their state.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses: list[float] = []
        weights = sum(parameter.nbytes for parameter in pl_module.parameters())
        self.before = torch.cuda.memory_allocated() - weights

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        if len(self.losses) == 1:
            torch.cuda.reset_peak_memory_stats()
        self.peak = torch.cuda.max_memory_allocated() - self.before


def loader(batch_size: int = SAMPLES, batches: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    count = min(SAMPLES, batch_size * batches)
    return DataLoader(TensorDataset(torch.randn(count, WIDTH, generator=generator)), batch_size=batch_size)


def train(
    *callbacks: Callback,
    data: Any = None,
    epochs: int = 3,
    dropout: float = 0.1,
    seed: int = 1,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[Wide, Losses]:
    """Fit on the device; the module is in main memory afterwards."""
    seed_everything(seed, verbose=False)
    module, losses = Wide(dropout), Losses()
    trainer = Trainer(
        **{
            "accelerator": "cuda",
            "devices": 1,
            "max_epochs": epochs,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [*callbacks, losses],
            **options,
        }
    )
    resume: dict[str, Any] = {} if ckpt_path is None else {"ckpt_path": ckpt_path, **WEIGHTS_ONLY}
    trainer.fit(module, loader() if data is None else data, **resume)
    return module, losses


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().cpu()
