"""What the scenarios of FullyShardStrategy share: a model of blocks, a GAN, and one fit from a seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_accel.strategies.fully_shard import FullyShardStrategy

BATCHES = 7  # an odd number: the last window of two is short
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Block(nn.Module):
    """A residual layer, as a transformer has them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Net(LightningModule):
    """A stem, three blocks and a head, that the step calls one by one: its own forward never runs in training.

    Args:
        optimizer: ``"sgd"``, ``"adamw"``, ``"adam fused"``, ``"adamw foreach"``, ``"adafactor"`` ...
        scheduler: A name of a scheduler, or nothing.
        extra: ``"batchnorm"``, ``"tied"``, ``"tied blocks"``, ``"frozen"``, ``"temperature"``, ``"scale"``,
            ``"compiled"`` or nothing.
    """

    def __init__(self, optimizer: str = "adamw", scheduler: str = "", extra: str = "") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.BatchNorm1d(16) if extra == "batchnorm" else nn.Identity()
        self.head = nn.Linear(16, 8)
        self.temperature = nn.Parameter(torch.tensor(1.5)) if extra == "temperature" else 1.0
        self.scale = nn.Parameter(torch.full((8,), 1.5)) if extra == "scale" else 1.0
        if extra == "tied":
            self.head.weight = nn.Parameter(self.stem.weight.detach().clone().t().contiguous())
            self.again = nn.Linear(16, 8)
            self.again.weight = self.head.weight
        if extra == "tied blocks":
            self.blocks[2].inner[0].weight = self.blocks[0].inner[0].weight
        if extra == "frozen":
            for layer in (self.stem, self.blocks[0].inner[0], self.blocks[1]):
                layer.requires_grad_(False)
        if extra == "compiled":
            for block in self.blocks:
                block.compile(backend="aot_eager")
        self.losses: list[float] = []
        self.evaluated: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y = self.head(self.norm(x)) * self.temperature * self.scale
        return y + self.again(x) if self.hparams["extra"] == "tied" else y

    def compute_loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden)) * self.temperature * self.scale
        if self.hparams["extra"] == "tied":
            logits = logits + self.again(hidden)
        return F.cross_entropy(logits, y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.compute_loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.evaluated.append(loss.item())
        self.log("val_loss", loss, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        name, _, kind = self.hparams["optimizer"].partition(" ")
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.1}]
        classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            "adamw": partial(torch.optim.AdamW, lr=3e-3),
            "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
            "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
            "nadam": partial(torch.optim.NAdam, lr=3e-3),
            "adafactor": partial(torch.optim.Adafactor, lr=3e-3),
            "adadelta": torch.optim.Adadelta,
            "radam": torch.optim.RAdam,
            "adamax": torch.optim.Adamax,
        }
        optimizer = classes[name](groups, **({kind: True} if kind else {}))
        scheduler = self.hparams["scheduler"]
        if not scheduler:
            return optimizer
        if scheduler == "LambdaLR":
            return [optimizer], [{"scheduler": lr_scheduler.LambdaLR(optimizer, _decay), "interval": "step"}]
        if scheduler == "OneCycleLR":
            steps = int(self.trainer.estimated_stepping_batches)
            one = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.01, 0.02], total_steps=steps)
            return [optimizer], [{"scheduler": one, "interval": "step"}]
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def _decay(step: int) -> float:
    return 1 / (1 + step)


class Gan(LightningModule):
    """Two optimizers, toggled, with layers outside of all blocks; or clipped and accumulated by hand."""

    def __init__(self, toggled: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggled = toggled
        self.generator = nn.Sequential(nn.Linear(8, 16), Block(), nn.Linear(16, 8))
        self.critic = nn.Sequential(nn.Linear(8, 16), Block(), nn.Linear(16, 1))
        self.losses: list[float] = []
        self.evaluated: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        first, second = self.optimizers()  # type: ignore[misc]
        if self.toggled:
            self.toggle_optimizer(first)
        loss = F.softplus(-self.critic(self.generator(x))).mean()
        self.manual_backward(loss)
        self.clip_gradients(first, 0.1, "norm")
        first.step()
        first.zero_grad()
        if self.toggled:
            self.untoggle_optimizer(first)
            self.toggle_optimizer(second)
        self.losses.append(loss.item())
        fake = self.generator(x).detach()
        loss = F.softplus(self.critic(fake)).mean()
        self.manual_backward(loss)
        real = F.softplus(-self.critic(x)).mean()
        self.manual_backward(real)
        self.losses.append((loss + real).item())
        if batch_idx % 2:
            second.step()
            second.zero_grad()
        if self.toggled:
            self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.AdamW(self.generator.parameters(), lr=3e-3),
            torch.optim.SGD(self.critic.parameters(), lr=0.05, momentum=0.9),
        )


def data(count: int = 2 * 4 * BATCHES, workers: int = 0, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 8, generator=generator)
    samples = TensorDataset(x, x.argmax(1))
    sampler = DistributedSampler(samples, WORLD, RANK, shuffle=shuffle)
    return DataLoader(samples, 4 * 2 // WORLD, sampler=sampler, num_workers=workers)


class Data(LightningDataModule):
    """The same, for a YAML."""

    def train_dataloader(self) -> DataLoader[Any]:
        return data()

    def val_dataloader(self) -> DataLoader[Any]:
        return data(16)


def restore_environment() -> None:
    os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD))  # a finished fit removes them


def make_trainer(strategy: Any, callbacks: Sequence[Callback] = (), **arguments: Any) -> Trainer:
    restore_environment()
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": WORLD,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("ModelCheckpoint" in type(item).__name__ for item in callbacks),
        "num_sanity_val_steps": 1,
        "use_distributed_sampler": False,
        "barebones": False,
    }
    return Trainer(strategy=strategy, callbacks=list(callbacks), **{**settings, **arguments})


def shards(**arguments: Any) -> FullyShardStrategy:
    """The strategy with each block of the toy on its own."""
    return FullyShardStrategy(**{"blocks": ["Block"], **arguments})


def weights(module: LightningModule) -> dict[str, Tensor]:
    """Whole and plain."""
    state = module.state_dict()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).float().clone()
        for name, value in state.items()
    }


def fit(
    strategy: Any,
    module: Callable[[], Any] = Net,
    callbacks: Callable[[], Sequence[Callback]] = tuple,
    ckpt_path: Path | None = None,
    seed: int = 1,
    **arguments: Any,
) -> tuple[Trainer, Any, dict[str, Any]]:
    """One fit from a seed, and what it gave."""
    torch.manual_seed(seed)
    made = module()
    trainer = make_trainer(strategy, callbacks(), **arguments)
    trainer.fit(made, data(), data(16), ckpt_path=ckpt_path)
    return trainer, made, results(made)


def results(module: Any) -> dict[str, Any]:
    """What a fit gave."""
    return {
        "losses": module.losses,
        "evaluated": module.evaluated,
        "weights": weights(module),
        "steps": module.trainer.global_step,
        "rates": [group["lr"] for optimizer in module.trainer.optimizers for group in optimizer.param_groups],
    }


class SaveAt(Callback):
    """Saves after a number of batches; after 0 at the end of the first epoch."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.batches == 0 == trainer.current_epoch:
            trainer.save_checkpoint(self.path)
