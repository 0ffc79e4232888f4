"""FullyShardStrategy: time of a step against bare fully_shard and DDP, and bytes a rank against the formula.

python benchmarks/bench_fully_shard.py [--quick]

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
from _ranks import RANK, RANKS, Model, Watch, bare_loop, fit, launch, local_bytes, take_turns, timed
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.wrapping import choose_blocks


class Held(Watch):
    """The bytes that this rank holds in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.bytes["gradients"] = local_bytes(parameter.grad for parameter in pl_module.parameters())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.bytes["parameters"] = local_bytes(pl_module.parameters())
        states = (state for optimizer in trainer.optimizers for state in optimizer.state.values())
        self.bytes["optimizer"] = local_bytes(
            value for state in states for name, value in state.items() if name != "step"
        )


def bare(batches: int) -> list[float]:
    """The loop that one would write with fully_shard: the same layers sharded, the same optimizer."""
    model, mesh = Model(), init_device_mesh("cpu", (RANKS,))
    for block in choose_blocks(model, ["TransformerEncoderLayer"])[0].values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return bare_loop(batches, lambda batch: (model(batch) - batch).square().mean(), model.configure_optimizers())


def sharded(batches: int, **arguments: Any) -> list[float]:
    return timed(FullyShardStrategy(["TransformerEncoderLayer"], **arguments), batches)


def held(precision: Any) -> dict[str, int]:
    watch = Held()
    fit(FullyShardStrategy(["TransformerEncoderLayer"]), 2, watch, precision)
    return watch.bytes


def rank_main(rounds: int, batches: int, out: Path) -> None:
    """What each rank runs; rank 0 writes what it found."""
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {"numbers": sum(parameter.numel() for parameter in Model().parameters())}
    if rounds:
        sharded(2)  # makes the process group
        sides = {
            "bare fully_shard": lambda: bare(batches),
            "FullyShardStrategy": lambda: sharded(batches),
            "reshard_after_forward=False": lambda: sharded(batches, reshard_after_forward=False),
            "DDP": lambda: timed("ddp", batches),
        }
        found["seconds"] = take_turns(sides, rounds)
    else:
        found["bytes"] = {precision: held(precision) for precision in ("32-true", "bf16-true")}
    if RANK == 0:
        out.write_text(json.dumps(found))


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
            found = launch(__file__, ranks, Path(folder) / f"{ranks}.json", "--rounds", "0")
            for precision, kinds in found["bytes"].items():
                size = 4 if precision == "32-true" else 2
                for name, copies in {"parameters": 1, "gradients": 1, "optimizer": 2}.items():
                    formula = copies * size * found["numbers"] / ranks
                    off = kinds[name] / formula - 1
                    print(
                        f"| {ranks} | {precision} | {name} | {kinds[name]:,} | {formula:,.0f} | {off:+.2%} |",
                        flush=True,
                    )
        rounds, batches = str(2 if arguments.quick else arguments.rounds), str(arguments.batches)
        found = launch(__file__, 2, Path(folder) / "timed.json", "--rounds", rounds, "--batches", batches)
    print(table("a step, 2 ranks", compare(found["seconds"])))


if __name__ == "__main__":
    main()
