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

from lightning_accel.strategies.zero import ZeROStrategy
from tests.strategies.launch import serve
from tests.strategies.zero_scenarios import gathered

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
GLOBAL_BATCH, STEPS = 6, 4  # samples in a step of all ranks; steps in an epoch


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
            self.weights = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


def strategy(stage: int | str) -> Any:
    if isinstance(stage, str):
        return stage
    # small models are not split by default
    config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
    return ZeROStrategy(stage=stage, config=config)


def make_trainer(stage: int | str, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        strategy=strategy(stage),
        accelerator="cpu",
        devices=WORLD,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning's would shuffle
        callbacks=list(callbacks),
        **{"max_epochs": 2, **options},
    )


def loader() -> DataLoader[Any]:
    """The same global batches for any number of ranks."""
    data = points()
    sampler = DistributedSampler(data, WORLD, int(os.environ["RANK"]), shuffle=False)
    return DataLoader(data, batch_size=GLOBAL_BATCH // WORLD, sampler=sampler)


def fit(
    stage: int | str, optimizer: str, *, save: Path | None = None, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Train two epochs, and save at each one's end, or go on from what was saved."""
    seed_everything(1 if resume is None else 99, verbose=False)
    recorder = Recorder()
    keep = [] if save is None else [ModelCheckpoint(save.parent, filename=save.name, save_top_k=-1)]
    callbacks = [recorder, *keep, *options.pop("callbacks", [])]
    trainer = make_trainer(stage, *callbacks, **options)
    trainer.fit(Net(optimizer), loader(), ckpt_path=resume)
    return {
        "losses": torch.stack(recorder.losses),
        "rates": recorder.rates,
        "batches": recorder.batches,
        "weights": recorder.weights,
        "step": trainer.global_step,
    }


def saved(folder: Path, stage: int | str, optimizer: str, ranks: int = 2) -> Path:
    return folder.parent / "saved" / f"{stage}-{optimizer}-{ranks}.ckpt"


def whole(stage: int | str, optimizer: str) -> Any:
    """Two epochs; what was there after the first is kept for the others."""

    def scenario(folder: Path) -> Any:
        path = saved(folder, stage, optimizer, WORLD)
        keep = ModelCheckpoint(path.parent, filename=f"{path.stem}-{{epoch}}", save_top_k=-1)
        result = fit(stage, optimizer, callbacks=[keep])
        if int(os.environ["RANK"]) == 0:
            (path.parent / f"{path.stem}-epoch=0.ckpt").rename(path)
        return result

    return scenario


def resumed(stage: int | str, optimizer: str, source: int | str, ranks: int) -> Any:
    return lambda folder: fit(stage, optimizer, resume=saved(folder, source, optimizer, ranks))


SCENARIOS: dict[str, Any] = {
    **{f"whole-{stage}-{kind}": whole(stage, kind) for stage in (1, 2, 3, "ddp") for kind in ("adamw", "sgd", "plain")},
    **{
        f"resumed-{stage}-{kind}-from-{source}-{ranks}": resumed(stage, kind, source, ranks)
        for stage in (1, 2, 3, "ddp")
        for kind in ("adamw", "sgd", "plain")
        for source in (1, 2, 3, "ddp")
        for ranks in (1, 2)
    },
}

if __name__ == "__main__":
    serve(SCENARIOS)
