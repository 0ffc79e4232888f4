"""FullyShardStrategy: time of a step against bare fully_shard and DDP, and bytes a rank against the formula.

python benchmarks/bench_fully_shard.py [--quick]

Ranks are processes of this machine, under gloo. A step's time is the CPU time of a batch on rank 0 (other
programs do not count), the median over one fit; the sides take turns, a fit at a time, in a random order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from _timing import compare, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_accel.report.sizes import tensor_bytes
from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.wrapping import choose_blocks

WIDTH, LAYERS, TOKENS, BATCH = 256, 4, 32, 4


class Model(LightningModule):
    """Layers of a transformer on random numbers."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Watch(Callback):
    """Seconds of each training batch, and the bytes that this rank holds at the end of one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes: dict[str, int] = {}
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.process_time()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.bytes["gradients"] = local_bytes([parameter.grad for parameter in pl_module.parameters()])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._began)
        self.bytes["parameters"] = local_bytes(pl_module.parameters())
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        self.bytes["optimizer"] = local_bytes(
            value for state in states for name, value in state.items() if name != "step"
        )


def local_bytes(tensors: Any) -> int:
    """Bytes of this rank's shards; gradients that were reduced together share one piece of memory."""
    return tensor_bytes(t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None)


def with_trainer(strategy: Any, batches: int, precision: Any = "32-true") -> Watch:
    torch.manual_seed(0)
    watch = Watch()
    restore_environment()
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=int(RANKS),
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
    trainer.fit(Model(), DataLoader(torch.randn(BATCH * batches, TOKENS, WIDTH), BATCH))
    return watch


def bare(batches: int) -> Watch:
    """The loop that one would write with fully_shard: the same layers sharded, the same optimizer."""
    torch.manual_seed(0)
    model, watch = Model(), Watch()
    mesh = init_device_mesh("cpu", (int(RANKS),))
    for block in choose_blocks(model, ["TransformerEncoderLayer"])[0].values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = model.configure_optimizers()
    for batch in DataLoader(torch.randn(BATCH * batches, TOKENS, WIDTH), BATCH):
        began = time.process_time()
        loss = (model(batch) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.seconds.append(time.process_time() - began)
    return watch


def sharded(batches: int, **arguments: Any) -> Watch:
    precision = arguments.pop("precision", "32-true")
    return with_trainer(FullyShardStrategy(["TransformerEncoderLayer"], **arguments), batches, precision)


RANKS, RANK = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")


def restore_environment() -> None:
    os.environ.update(WORLD_SIZE=RANKS, RANK=RANK, LOCAL_RANK=RANK)  # a finished fit removes them


def rank_main(rounds: int, batches: int, out: Path) -> None:
    """What each rank runs; rank 0 writes what it found."""
    warnings.filterwarnings("ignore")
    sides = {
        "bare fully_shard": bare,
        "FullyShardStrategy": sharded,
        "reshard_after_forward=False": lambda batches: sharded(batches, reshard_after_forward=False),
        "DDP": lambda batches: with_trainer("ddp", batches),
    }
    numbers = sum(parameter.numel() for parameter in Model().parameters())
    held = {precision: sharded(2, precision=precision).bytes for precision in ("32-true", "bf16-true")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}  # rounds begin at -1, which only warms up
    order, shuffler = list(sides), random.Random(0)
    for number in range(-1, rounds):
        shuffler.shuffle(order)
        for name in order:
            times = sides[name](batches).seconds[2:]
            if number >= 0:
                seconds[name].append(median(times))
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"seconds": seconds, "bytes": held, "numbers": numbers}))


def launch(ranks: int, rounds: int, batches: int, out: Path) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [sys.executable, __file__, "--rank-of", str(out), "--rounds", str(rounds), "--batches", str(batches)]
    common = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            arguments,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    try:
        if any([process.wait(timeout=600) for process in processes]):
            raise RuntimeError(f"A rank of {ranks} failed.")
    finally:
        for process in processes:
            process.kill()
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=14)
    parser.add_argument("--rank-of", type=Path)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank_main(arguments.rounds, arguments.batches, arguments.rank_of)
        return
    print(environment())
    print("| ranks | precision | | bytes a rank | formula | off |\n| ---: | --- | --- | ---: | ---: | ---: |")
    with TemporaryDirectory() as folder:
        for ranks in (1, 2) if arguments.quick else (1, 2, 4):
            found = launch(ranks, -1, 3, Path(folder) / f"{ranks}.json")
            for precision, held in found["bytes"].items():
                size = 4 if precision == "32-true" else 2
                for name, copies in {"parameters": 1, "gradients": 1, "optimizer": 2}.items():
                    formula = copies * size * found["numbers"] / ranks
                    off = held[name] / formula - 1
                    print(
                        f"| {ranks} | {precision} | {name} | {held[name]:,} | {formula:,.0f} | {off:+.2%} |", flush=True
                    )
        found = launch(2, 2 if arguments.quick else arguments.rounds, arguments.batches, Path(folder) / "timed.json")
    print(table("a step, 2 ranks", compare(found["seconds"])))


if __name__ == "__main__":
    main()
