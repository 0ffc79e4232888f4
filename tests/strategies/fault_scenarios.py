"""Faults at the start of a run: what each rank is told, and how long it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy

from lightning_accel import AutoResume
from lightning_accel.strategies.ddp import RestartableDDPStrategy
from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.zero import ZeROStrategy
from tests.durability.runs import Net, loader
from tests.strategies.launch import serve

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "accel_ddp": RestartableDDPStrategy,
    "zero2": partial(ZeROStrategy, stage=2),
    "fsdp2": FullyShardStrategy,
}
RANK = int(os.environ.get("RANK", 0))
PORTS = os.environ.get("FREE_PORTS", "").split()


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables of the environment, for the block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def skipped() -> tuple[str, float]:
    PORTS.pop()
    return "not started", 0.0


def told(strategy: Strategy, callbacks: list[Callback] | None = None, **options: Any) -> tuple[str, float]:
    """The error of a fit, and the seconds until it came; the process is then as it was."""
    # each start has its own: a rank that is late would meet what the last one left
    os.environ.setdefault("MASTER_PORT", PORTS.pop())
    began = time.monotonic()
    options = {"enable_checkpointing": bool(callbacks), "callbacks": callbacks, **options}
    try:
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_steps=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            **options,
        )
        trainer.fit(Net(), loader())
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.pop("MASTER_PORT")
    return "nothing", time.monotonic() - began


def port_in_use(folder: Path) -> list[Any]:
    """Someone else serves at MASTER_PORT, and answers nothing."""
    results = []
    for make in STRATEGIES.values():
        with environment(MASTER_PORT=os.environ["TAKEN_PORT"]):
            results.append(told(make(start_timeout=2)))
    return results


def missing(rank: int, folder: Path) -> list[Any]:
    """One rank of two is never started."""
    return [told(make(start_timeout=1)) if rank != RANK else skipped() for make in STRATEGIES.values()]


def no_such_interface(folder: Path) -> list[Any]:
    """Rank 1 is told to use a network interface that it does not have."""
    with environment(**({"GLOO_SOCKET_IFNAME": "nosuch"} if RANK else {})):
        return [told(make()) for make in STRATEGIES.values()]


def no_compiler(folder: Path) -> list[Any]:
    """An op must be compiled, but there is nothing to compile it with."""
    with environment(PATH=str(folder), TORCH_EXTENSIONS_DIR=str(folder / "extensions")):
        return [told(offload())]


def dead_build(folder: Path) -> list[Any]:
    """A build of that op was killed, and left its lock."""
    lock = folder / "dead" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (1, 1))
    with environment(TORCH_EXTENSIONS_DIR=str(folder / "dead")):
        return [told(offload())]


def offload() -> Strategy:
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    return ZeROStrategy(stage=2, offload_optimizer="cpu", config=config)


def disk_of_one_machine(folder: Path) -> list[Any]:
    """The checkpoint that AutoResume chooses is on rank 0's disk alone."""
    folder = folder / "disk"
    told(RestartableDDPStrategy(), [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)])

    exists = os.path.exists
    if RANK == 1:
        os.path.exists = lambda path: not str(path).endswith(".ckpt") and exists(path)  # type: ignore[assignment]
    try:
        return [told(RestartableDDPStrategy(), [AutoResume(), ModelCheckpoint(folder)])]
    finally:
        os.path.exists = exists


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "port in use": port_in_use,
    "rank 0 is missing": partial(missing, 0),
    "rank 1 is missing": partial(missing, 1),
    "no such interface": no_such_interface,
    "no compiler": no_compiler,
    "dead build": dead_build,
    "disk of one machine": disk_of_one_machine,
}

if __name__ == "__main__":
    del os.environ["MASTER_PORT"]
    serve(SCENARIOS)
