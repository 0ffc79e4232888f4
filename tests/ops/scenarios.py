"""What the tests of DeepSpeed's compiled ops run on two ranks: offload to main memory and to a disk, beside DDP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel.strategies.registry import register_strategies
from lightning_accel.strategies.zero import ZeROStrategy
from tests.strategies.launch import serve
from tests.strategies.zero_scenarios import Points, Recorder, trainer_for

WIDTH = 800  # half of a layer is over 1 MiB, below which DeepSpeed writes nothing to a disk
RATE = 1e-3
register_strategies()


class Wide(LightningModule):
    """Layers large enough for a disk, with AdamW of torch or of DeepSpeed."""

    def __init__(self, optimizer: str = "torch") -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)
        )
        self.kind = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        if self.kind == "torch":
            return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.01)
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(self.parameters(), lr=RATE, weight_decay=0.01)


class Watch(Callback):
    """Saves after the first epoch, and notes how much is on the disk and which optimizer runs."""

    def __init__(self, checkpoint: Path, disk: Path | None) -> None:
        self.checkpoint, self.disk = checkpoint, disk
        self.bytes, self.optimizer = 0, ""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.checkpoint)
        if self.disk is not None:
            self.bytes = sum(file.stat().st_size for file in self.disk.rglob("*") if file.is_file())
        self.optimizer = type(getattr(trainer.model.optimizer, "optimizer", None)).__name__  # type: ignore[union-attr]


def fit(strategy: Any, module: LightningModule, folder: Path, watch: list[Watch], resume: Path | None = None) -> Any:
    recorder = Recorder()
    trainer = trainer_for(strategy, folder, [*watch, recorder])
    trainer.fit(module, DataLoader(Points(), batch_size=2), ckpt_path=resume)
    return {"losses": recorder.losses, "weights": recorder.weights, "step": trainer.global_step}


def run(folder: Path, name: str, make: Callable[[Path], Any], optimizer: str = "torch", disk: bool = False) -> Any:
    """Under DDP; with the ops; and with them again from the middle, from other weights."""
    seed_everything(1)
    found = {"ddp": fit("ddp", Wide(), folder, [])}
    disk_folder = folder / f"{name} disk"
    disk_folder.mkdir(exist_ok=True)
    watch = Watch(folder / f"{name}.ckpt", disk_folder if disk else None)
    seed_everything(1)
    found["ours"] = fit(make(disk_folder), Wide(optimizer), folder, [watch])
    torch.manual_seed(2)  # and not the sampler's seed
    found["resumed"] = fit(make(disk_folder), Wide(optimizer), folder, [], watch.checkpoint)
    return {**found, "bytes": watch.bytes, "optimizer": watch.optimizer}


def by_config(stage: int, folder: Path, **options: Any) -> ZeROStrategy:
    """DeepSpeed's own optimizer, of its configuration."""
    adam = {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0.01}}
    return ZeROStrategy(stage, offload_optimizer="cpu", config={"optimizer": adam}, **options)  # type: ignore[arg-type]


def on_disk(folder: Path, parameters: str = "nvme") -> ZeROStrategy:
    """Where a Trainer by the name `accel_zero3_nvme` would write to /local_nvme."""
    return ZeROStrategy(3, "nvme", parameters, str(folder), stage3={"persistence_threshold": 0})  # type: ignore[arg-type]


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "zero2 config": partial(run, name="zero2 config", make=partial(by_config, 2)),
    "zero3 config": partial(run, name="zero3 config", make=partial(by_config, 3, offload_parameters="cpu")),
    "zero2 name": partial(run, name="zero2 name", make=lambda _: "accel_zero2_offload", optimizer="deepspeed"),
    "zero3 name": partial(run, name="zero3 name", make=lambda _: "accel_zero3_offload", optimizer="deepspeed"),
    "nvme torch": partial(run, name="nvme torch", make=on_disk, disk=True),
    "nvme deepspeed": partial(run, name="nvme deepspeed", make=on_disk, optimizer="deepspeed", disk=True),
    "nvme optimizer": partial(run, name="nvme optimizer", make=partial(on_disk, parameters="none"), disk=True),
}


if __name__ == "__main__":
    serve(SCENARIOS)
