"""ZeroRedundancyStrategy: bytes of optimizer state a rank, and time of a step against DDP and torch's own optimizer.

python benchmarks/bench_zero_redundancy.py [--quick]

Ranks are processes of this machine, under gloo. A step's time is the CPU time of a batch on rank 0 (other
programs do not count), the median over one fit; the sides take turns, a fit at a time, in a random order.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _timing import compare, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
import torch.distributed as dist
from _ranks import RANKS, Model, Step, Watch, bare_loop, fit, launch, restore_environment, take_turns, timed
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.report.sizes import optimizer_state_bytes
from lightning_accel.strategies.ddp import RestartableDDPStrategy
from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy


class Held(Watch):
    """The bytes of this rank's optimizer state."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bytes = optimizer_state_bytes(trainer.optimizers)


def bare(batches: int) -> list[float]:
    """The loop that one would write with torch's ZeroRedundancyOptimizer."""
    model = DistributedDataParallel(Step())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
    return bare_loop(batches, model, optimizer)


def rank_main(rounds: int, batches: int, out: Path) -> None:
    """What each rank runs; rank 0 writes what it found."""
    warnings.filterwarnings("ignore")
    found: Any
    if rounds:
        fit(RestartableDDPStrategy(), 1, Watch())  # makes the process group
        sides = {
            "RestartableDDPStrategy": lambda: timed(RestartableDDPStrategy(), batches),
            "ZeroRedundancyStrategy": lambda: timed(ZeroRedundancyStrategy(), batches),
            "a bare loop, torch's ZeroRedundancyOptimizer": lambda: bare(batches),
        }
        found = take_turns(sides, rounds)
    else:
        watch = Held()
        fit(ZeroRedundancyStrategy(), 2, watch)
        found = [None] * RANKS
        dist.all_gather_object(found, watch.bytes)
    restore_environment()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few batches, to see that it runs")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=20, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank_main(arguments.rounds, arguments.batches, arguments.rank_of)
        return
    print(environment())
    numbers = sum(parameter.numel() for parameter in Model().parameters())
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        print(f"\n| ranks | bytes of AdamW's state on each rank | the most, to 8 x {numbers:,} / ranks |")
        print("| ---: | --- | ---: |")
        for ranks in (1, 2) if arguments.quick else (1, 2, 4):
            held = launch(__file__, ranks, out)
            each = ", ".join(f"{size:,}" for size in held)
            print(f"| {ranks} | {each} | {max(held) * ranks / (8 * numbers):.3f} |")
        rounds = 2 if arguments.quick else 5
        times = launch(__file__, 2, out, "--rounds", str(rounds), "--batches", "8" if arguments.quick else "20")
    print(f"\n{table('CPU time of a batch, 2 ranks', compare(times), unit=1e-3, unit_name='ms')}")


if __name__ == "__main__":
    main()
