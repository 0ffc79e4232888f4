"""What the benchmarks of sharding share: a model, what each rank is started with, and time and bytes of a fit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from _timing import shuffled  # first: it sets the threads before torch is imported

# isort: split
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_accel.report.sizes import tensor_bytes

__all__ = [
    "RANK",
    "RANKS",
    "Model",
    "Step",
    "Watch",
    "bare_loop",
    "batches_of",
    "fit",
    "launch",
    "local_bytes",
    "restore_environment",
    "take_turns",
    "timed",
]

WIDTH, LAYERS, TOKENS, BATCH = 256, 4, 32, 4
RANKS, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


class Model(LightningModule):
    """Layers of a transformer on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        return (self(batch) - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Step(nn.Module):
    """The module's step as a forward, as DDP and DeepSpeed want it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Model()

    def forward(self, batch: Tensor) -> Tensor:
        return self.module.training_step(batch)


class Watch(Callback):
    """CPU seconds of each training batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def local_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of this rank's shards; gradients that were reduced together share one piece of memory."""
    return tensor_bytes(t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None)


def restore_environment() -> None:
    os.environ.update(WORLD_SIZE=str(RANKS), RANK=str(RANK), LOCAL_RANK=str(RANK))  # a finished fit removes them


def batches_of(count: int) -> DataLoader[Tensor]:
    torch.manual_seed(0)
    return DataLoader(torch.randn(BATCH * count, TOKENS, WIDTH), BATCH)  # type: ignore[arg-type]


def fit(strategy: Any, batches: int, watch: Callback, precision: Any = "32-true") -> None:
    loader = batches_of(batches)
    restore_environment()
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=RANKS,
        max_steps=batches,
        max_epochs=-1,
        precision=precision,
        callbacks=[watch],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Model(), loader)


def timed(strategy: Any, batches: int) -> list[float]:
    """CPU seconds of each batch of a fit."""
    watch = Watch()
    fit(strategy, batches, watch)
    return watch.seconds


def bare_loop(batches: int, loss_of: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    """CPU seconds of each batch of the loop that one would write without a Trainer."""
    seconds = []
    for batch in batches_of(batches):
        began = time.process_time()
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
    return seconds


def take_turns(sides: Mapping[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[float]]:
    """The median seconds of a batch of each side, a round each; the order is random, and the same on every rank."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, order in enumerate(shuffled(list(sides), rounds + 1)):
        for name in order:
            times = sides[name]()[2:]
            if number:  # the first round only warms up
                seconds[name].append(median(times))
    return seconds


def launch(script: str, ranks: int, out: Path, *arguments: str) -> Any:
    """Run ``script --rank-of OUT ARGUMENTS`` on several ranks; return what rank 0 wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    out.unlink(missing_ok=True)
    with out.with_suffix(".log").open("w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, script, "--rank-of", str(out), *arguments],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(ranks)
        ]
        try:
            if any([process.wait(timeout=1800) for process in processes]):
                raise RuntimeError(f"A rank of {ranks} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")
        finally:
            for process in processes:
                process.kill()
    return json.loads(out.read_text())
