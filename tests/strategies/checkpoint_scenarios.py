"""What the tests of ZeROStrategy's checkpoints run on one, two and three ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.sharded_state import gather
from lightning_accel.strategies.zero import ZeROStrategy
from tests.strategies.zero_scenarios import gathered

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
GLOBAL_BATCH, STEPS = 12, 4  # samples in a step of all ranks; steps in an epoch


def points() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    size = GLOBAL_BATCH * STEPS
    return TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))


class Net(LightningModule):
    """Two groups, tied weights, a frozen layer, a buffer: sizes that no number of ranks divides."""

    def __init__(self, optimizer: str = "adamw", width: int = 11, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(6, width)
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.two.weight = self.one.weight
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.last = nn.Linear(width, 3)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.two(torch.tanh(self.frozen(self.one(x))))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        trained = {name: value for name, value in self.named_parameters() if value.requires_grad}
        groups = [
            {"params": [value for name, value in trained.items() if "weight" in name], "weight_decay": 0.1},
            {"params": [value for name, value in trained.items() if "bias" in name], "lr": 0.02, "weight_decay": 0.0},
        ]
        kind = self.hparams["optimizer"]
        if kind == "adamw":
            optimizer: Any = torch.optim.AdamW(groups, lr=0.05)
        else:
            optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9 if kind == "sgd" else 0.0)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[0.08, 0.04], total_steps=40, cycle_momentum=kind != "plain"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Recorder(Callback):
    """The losses over all ranks, the learning rates, the weights at the end, and a state of its own."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.rates: list[float] = []
        self.batches = 0
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean"))
        self.rates += [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.batches += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with gathered(pl_module):
            self.weights = gather(pl_module.state_dict(), torch.device("cpu"), keep=True)
            self.weights = {name: value.clone() for name, value in self.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


KINDS = ("1", "2", "3", "fsdp2")  # and variants: "2o" offloads, "3b" is bf16-true, "3m" bf16-mixed
PRECISION = {"b": "bf16-true", "m": "bf16-mixed"}


def strategy(kind: str) -> Any:
    if kind == "ddp":
        return kind
    offload = kind.endswith("o")
    if kind.startswith("fsdp2"):
        return FullyShardStrategy(offload=offload)
    stage: Any = int(kind[0])
    # small models are not split by default
    config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
    return ZeROStrategy(
        stage=stage,
        config=config,
        offload_optimizer="cpu" if offload else "none",
        offload_parameters="cpu" if offload and stage == 3 else "none",
    )


def make_trainer(kind: str, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        strategy=strategy(kind),
        precision=PRECISION.get(kind[-1], "32-true"),  # type: ignore[arg-type]
        accelerator="cpu",
        devices=WORLD,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning's would shuffle
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **{"max_epochs": 2, **options},
    )


def loader() -> DataLoader[Any]:
    """The same global batches for any number of ranks."""
    data = points()
    sampler = DistributedSampler(data, WORLD, int(os.environ["RANK"]), shuffle=False)
    return DataLoader(data, batch_size=GLOBAL_BATCH // WORLD, sampler=sampler)


def fit(
    kind: str, optimizer: str, *, save: Path | None = None, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Train two epochs, and save at each one's end, or go on from what was saved."""
    seed_everything(1 if resume is None else 99, verbose=False)
    recorder = Recorder()
    keep = [] if save is None else [ModelCheckpoint(save.parent, filename=save.name, save_top_k=-1)]
    callbacks = [recorder, *keep, *options.pop("callbacks", [])]
    trainer = make_trainer(kind, *callbacks, **options)
    trainer.fit(Net(optimizer), loader(), ckpt_path=resume)
    return {
        "losses": torch.stack(recorder.losses),
        "rates": recorder.rates,
        "batches": recorder.batches,
        "weights": recorder.weights,
        "step": trainer.global_step,
    }


def saved(folder: Path, kind: str, optimizer: str, ranks: int = 2) -> Path:
    return folder.parent / "saved" / f"{kind}-{optimizer}-{ranks}.ckpt"


def whole(kind: str, optimizer: str) -> Any:
    """Two epochs; what was there after the first is kept for the others."""

    def scenario(folder: Path) -> Any:
        path = saved(folder, kind, optimizer, WORLD)
        keep = ModelCheckpoint(path.parent, filename=f"{path.stem}-{{epoch}}", save_top_k=-1)
        result = fit(kind, optimizer, callbacks=[keep])
        if int(os.environ["RANK"]) == 0:
            (path.parent / f"{path.stem}-epoch=0.ckpt").rename(path)
        return result

    return scenario


def resumed(kind: str, optimizer: str, source: str, ranks: str) -> Any:
    return lambda folder: fit(kind, optimizer, resume=saved(folder, source, optimizer, int(ranks)))


def find(name: str) -> Any:
    """The scenario ``whole-KIND-OPTIMIZER``, or ``resumed-KIND-OPTIMIZER-from-KIND-RANKS``."""
    what, kind, optimizer, *rest = name.split("-")
    return whole(kind, optimizer) if what == "whole" else resumed(kind, optimizer, *rest[1:])
