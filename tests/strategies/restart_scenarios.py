"""A run that is killed and started again, for the tests and the benchmark of restarts.

    torchrun --nproc-per-node 2 --max-restarts 3 -m tests.strategies.restart_scenarios FOLDER STRATEGY,... [KILL ...]

trains a small module with dropout, batch norm, a schedule and accumulation, and saves every two steps; under one
strategy after another, each in a folder of its name, and what an earlier start has finished is passed over. A KILL is
``strategy:start:rank:step:where``: in that start (0 is the first) that rank gets SIGKILL at that step, ``where`` being
"batch" (when a batch begins), "save" (when a checkpoint is made), "shard" (when the rank has its file open, or reads
it again) or "move" (when the checkpoint is whole, but not in its place). A strategy that is named ``whole NAME`` is
NAME in a folder of its own, without kills.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lightning_accel import AutoResume, ExactResume
from lightning_accel.strategies.ddp import RestartableDDPStrategy
from tests.durability.runs import Net, loader, seed

STEPS = 18
EVENTS = {"shard": "open", "move": "os.rename"}  # what Python tells audit hooks


class Kill(Callback):
    """Kills its own process, as nobody can catch it."""

    def __init__(self, start: str, rank: str, step: str, where: str) -> None:
        self.start, self.rank, self.step, self.where = int(start), int(rank), int(step), where

    def now(self, trainer: Trainer, where: str) -> None:
        here = (int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), trainer.global_rank, trainer.global_step, where)
        if here == (self.start, self.rank, self.step, self.where):
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == EVENTS.get(self.where) and ".partial" in str(arguments[0]):
                self.now(trainer, self.where)

        sys.addaudithook(audit)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.now(trainer, "batch")

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self.now(trainer, "save")


class Progress(Callback):
    """Writes each rank's process, step and time, for one who kills from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        file = self.folder / f"at.{trainer.global_rank}"
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        (self.folder / "new").with_suffix(file.suffix).write_text(
            f"{os.getpid()} {trainer.global_step} {start} {time.time()}"
        )
        os.replace((self.folder / "new").with_suffix(file.suffix), file)


def make_strategy(name: str) -> Strategy:
    if name == "ddp":
        return DDPStrategy()
    if name == "accel_ddp":
        return RestartableDDPStrategy()
    if name.startswith("zero"):
        from lightning_accel.strategies.zero import ZeROStrategy

        return ZeROStrategy(stage=int(name[-1]))
    from lightning_accel.strategies.fully_shard import FullyShardStrategy

    return FullyShardStrategy()


def train(folder: Path, name: str, kills: list[Kill], steps: int = STEPS) -> dict[str, Any]:
    """Train, or go on training; return the weights, the schedule and the step at the end."""
    seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    save = ModelCheckpoint(
        folder / "checkpoints", every_n_train_steps=2, monitor="step", mode="max", save_top_k=2, filename="{step}"
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_strategy(name),
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        callbacks=[AutoResume(), ExactResume(), save, Progress(folder), *kills],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    module = Net(total_steps=steps)
    trainer.fit(module, loader())
    weights = {key: getattr(value, "full_tensor", value.detach)().clone() for key, value in module.state_dict().items()}
    rate = float(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"weights": weights, "step": trainer.global_step, "rate": rate, "left": left}


def main(folder: Path, names: list[str], kills: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    steps = int(os.environ.get("STEPS", STEPS))
    for name in names:
        result = folder / f"{name}.pt"
        if result.exists():
            continue
        of_name = [kill.split(":")[1:] for kill in kills if kill.split(":")[0] == name]
        ended = train(folder / name, name.removeprefix("whole "), [Kill(*kill) for kill in of_name], steps)
        ended["restarts"] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if os.environ["RANK"] == "0":
            torch.save(ended, folder / "new.pt")
            os.replace(folder / "new.pt", result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
