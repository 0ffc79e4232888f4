"""What the tests of ZeROStrategy run on two ranks: the same fit under DDP and under ZeRO, and what must be equal."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_accel.strategies.zero import ZeROStrategy
from tests.strategies.launch import serve

warnings.simplefilter("ignore")
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Points and their classes, from a seed."""

    def __init__(self, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, 6, generator=generator)
        self.y = torch.randint(0, 3, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Toy(LightningModule):
    """Two layers; the optimizer is what the scenario says."""

    def __init__(self, optimizer: Callable[[Any], Any] = lambda p: torch.optim.AdamW(p, lr=0.05)) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
        self.make = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self.make(self)


class Recorder(Callback):
    """The losses, and the weights at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with gathered(pl_module):
            self.weights = {name: value.detach().clone().float() for name, value in pl_module.named_parameters()}


def gathered(module: nn.Module) -> Any:
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def fit(strategy: Any, module: LightningModule, folder: Path, callbacks: Any = (), **options: Any) -> dict[str, Any]:
    """What a fit of two epochs of eight batches a rank gave."""
    recorder = Recorder()
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks, recorder],
        **{"max_epochs": 2, **options},
    )
    trainer.fit(module, DataLoader(Points(), batch_size=2))
    return {"losses": recorder.losses, "weights": recorder.weights, "step": trainer.global_step}


def compare(make: Callable[[], LightningModule], **options: Any) -> Callable[[Path], Any]:
    """DDP, then the three stages."""

    def scenario(folder: Path) -> Any:
        found = {}
        for name in ("ddp", "1", "2", "3"):
            seed_everything(1)
            config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if name == "3" else None
            strategy = "ddp" if name == "ddp" else ZeROStrategy(stage=int(name), config=config)
            found[name] = fit(strategy, make(), folder, **options)
        return found

    return scenario


def sgd(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)


SCENARIOS = {
    "sgd": compare(lambda: Toy(sgd)),
    "adamw": compare(lambda: Toy(lambda m: torch.optim.AdamW(m.parameters(), lr=0.05))),
    "accumulation": compare(lambda: Toy(sgd), accumulate_grad_batches=3),
    "clip_norm": compare(lambda: Toy(sgd), gradient_clip_val=0.05),
    "clip_value": compare(lambda: Toy(sgd), gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "autocast": compare(lambda: Toy(sgd), precision="bf16-mixed"),
}

if __name__ == "__main__":
    serve(SCENARIOS)
