"""A run that is killed and started again, for the tests and the benchmark of restarts.

    torchrun --nproc-per-node 2 --max-restarts 3 -m tests.strategies.restart_scenarios FOLDER STRATEGY [KILL ...]

trains a small module with dropout, batch norm, a schedule and accumulation, and saves every two steps. A KILL is
``start:rank:step:where``: in that start (0 is the first) that rank gets SIGKILL at that step, ``where`` being "batch"
(when a batch begins), "save" (when a checkpoint is made) or "write" (when it is written, but not in its place).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lightning_accel import AutoResume, ExactResume
from lightning_accel.hooks import atomic
from lightning_accel.strategies.ddp import RestartableDDPStrategy
from tests.durability.runs import Net, loader, seed
from tests.strategies.launch import serve

STEPS = 18


class Kill(Callback):
    """Kills its own process, as nobody can catch it."""

    def __init__(self, start: str, rank: str, step: str, where: str) -> None:
        self.start, self.rank, self.step, self.where = int(start), int(rank), int(step), where

    def now(self, trainer: Trainer, where: str) -> None:
        here = (int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), trainer.global_rank, trainer.global_step, where)
        if here == (self.start, self.rank, self.step, self.where):
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.where == "write":  # the file is whole, but still beside its place
            flush = atomic._flush

            def killed(path: Path) -> None:
                self.now(trainer, "write")
                flush(path)

            atomic._flush = killed

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.now(trainer, "batch")

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self.now(trainer, "save")


class Progress(Callback):
    """Writes each rank's process and step, for one who kills from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        (self.folder / f"at.{trainer.global_rank}").write_text(f"{os.getpid()} {trainer.global_step}")


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
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
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
    # AutoResume finds what was saved last, wherever the run began
    return {"weights": full_weights(trainer), "step": trainer.global_step, "rate": rate(trainer)}


def full_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = trainer.strategy.lightning_module_state_dict()
    return {name: value.detach().clone() for name, value in (state or {}).items()}


def rate(trainer: Trainer) -> float:
    return float(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])


def main(folder: Path, name: str, kills: list[str]) -> None:
    torch.set_num_threads(1)
    result = train(folder, name, [Kill(*kill.split(":")) for kill in kills])
    result["restarts"] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    torch.save(result, folder / f"result.{os.environ['RANK']}.pt")


def uninterrupted(name: str) -> Any:
    return lambda folder: train(folder / name, name, [])


def equal_to_ddp(folder: Path) -> list[Any]:
    return [train(folder / f"equal {name}", name, []) for name in ("ddp", "accel_ddp")]


def again_in_one_process(folder: Path) -> int:
    """The group is made, destroyed, and made again, as in a notebook."""
    for number in range(2):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        result = train(folder / f"again {number}", "accel_ddp", [], steps=2)
    return int(result["step"])


SCENARIOS = {
    "again in one process": again_in_one_process,
    "equal to ddp": equal_to_ddp,
    **{name: uninterrupted(name) for name in ("accel_ddp", "zero2", "fsdp2")},
}

if __name__ == "__main__":
    if sys.argv[2] in SCENARIOS and "TORCHELASTIC_RUN_ID" not in os.environ:
        serve(SCENARIOS)
    else:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
