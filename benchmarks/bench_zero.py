"""ZeROStrategy: bytes a rank against the formula, and time of a step against the bare DeepSpeed engine and DDP.

python benchmarks/bench_zero.py [--quick]

Ranks are processes of this machine, under gloo. A step's time is the CPU time of a batch on rank 0 (other
programs do not count). Against the bare engine: batch by batch in one process, whose turns they take. Against DDP: the
median over one fit; the sides take turns, a fit at a time, in a random order.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _timing import compare, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
import torch.distributed as dist
from _ranks import RANK, RANKS, Model, Step, bare_loop, fit, launch, local_bytes, take_turns, timed
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.strategies.zero import ZeROStrategy
from lightning_accel.strategies.zero_config import zero_bytes

STAGES = (1, 2, 3)


class Held(Callback):
    """The bytes that this rank holds, where DeepSpeed keeps them; gradients when all of them are there."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.straddling = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        engine: Any = trainer.model
        zero, parameters = engine.optimizer, list(pl_module.parameters())
        if engine.zero_optimization_partition_weights():
            self.bytes["parameters"] = local_bytes(parameter.ds_tensor for parameter in parameters)
            self.bytes["gradients"] = local_bytes([zero.grad_partitions_flat_buffer])
            self.bytes["master"] = local_bytes(zero.fp32_partitioned_groups_flat)
            return
        self.bytes["parameters"] = local_bytes(parameters)
        self.bytes["master"] = local_bytes(zero.single_partition_of_fp32_groups)
        if engine.zero_optimization_partition_gradients():
            self.bytes["gradients"] = local_bytes(g for group in zero.all_grad_tensors.values() for g in group or ())
            members = [member for group in zero.params_in_partition for member in group]
            own = sum(int(size) for size in zero.partition_size)
            self.straddling = (sum(member.numel() for member in members) - own) * members[0].element_size()
        else:
            self.bytes["gradients"] = local_bytes(parameter.grad for parameter in parameters)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        states = trainer.model.optimizer.optimizer.state.values()  # type: ignore[union-attr]
        self.bytes["state"] = local_bytes(
            value for state in states for value in state.values() if torch.is_tensor(value) and value.ndim
        )


def zero(stage: int) -> ZeROStrategy:
    """Everything split, however small."""
    return ZeROStrategy(stage, stage3={"persistence_threshold": 0} if stage == 3 else None)  # type: ignore[arg-type]


def held() -> Iterator[dict[str, Any]]:
    numbers = sum(parameter.numel() for parameter in Model().parameters())
    for precision, size in (("32-true", 4), ("bf16-true", 2)):
        for stage in STAGES:
            watch = Held()
            fit(zero(stage), 2, watch, precision)
            formula = zero_bytes(numbers, stage, RANKS, parameter_bytes=size)
            everyone: list[Any] = [None] * RANKS
            dist_gather(everyone, watch)
            yield {"precision": precision, "stage": stage, "formula": formula, "held": everyone}


def dist_gather(everyone: list[Any], watch: Held) -> None:
    own = {**watch.bytes, "straddling": watch.straddling}
    if RANKS == 1:
        everyone[0] = own
    else:
        dist.all_gather_object(everyone, own)


class Pairs(Callback):
    """After each batch of the fit, one of the loop that one would write with DeepSpeed: CPU seconds of both."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = copy.deepcopy(config)
        self.seconds: dict[str, list[float]] = {"bare": [], "ours": []}

    def on_train_start(self, *_: Any) -> None:
        import deepspeed

        model = Step()
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(model.parameters()),
            optimizer=model.module.configure_optimizers(),
            config=self.config,
            dist_init_required=False,
        )

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        ended = time.process_time()
        self.engine.backward(self.engine(batch))
        self.engine.step()
        self.seconds["ours"].append(ended - self._began)
        self.seconds["bare"].append(time.process_time() - ended)


def pairs(stage: int, fits: int, batches: int) -> dict[str, list[float]]:
    """CPU seconds of every batch but the first three of each fit."""
    strategy = zero(stage)
    fit(strategy, 2, Callback())
    config = copy.deepcopy(strategy.config)  # what the strategy gives to its engine
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(fits):
        watch = Pairs(config)
        fit(zero(stage), batches + 3, watch)
        watch.engine.destroy()
        for side, values in watch.seconds.items():
            seconds[side] += values[3:]
    return seconds


def bare_ddp(batches: int) -> list[float]:
    step = Step()
    return bare_loop(batches, DistributedDataParallel(step), step.module.configure_optimizers())


def rank_main(rounds: int, batches: int, out: Path) -> None:
    """What each rank runs; rank 0 writes what it found."""
    warnings.filterwarnings("ignore")
    found: Any
    if rounds:
        sides = {"bare DDP": lambda: bare_ddp(batches), "DDP": lambda: timed("ddp", batches)}
        for stage in STAGES:
            sides[f"ZeROStrategy, stage {stage}"] = lambda stage=stage: timed(zero(stage), batches)  # type: ignore[misc]
        found = {"turns": take_turns(sides, rounds), "pairs": [pairs(stage, rounds // 2, batches) for stage in STAGES]}
    else:
        found = list(held())
    if RANK == 0:
        out.write_text(json.dumps(found))


def print_bytes(ranks: int, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        cells = []
        for kind, formula in row["formula"].items():
            most = max(rank[kind] for rank in row["held"])
            cells.append(f"{most:,} ({most / formula:.3f})")
        whole = [rank for rank in row["held"] if rank["straddling"]]
        share = row["formula"]["gradients"]
        off = max((abs(rank["gradients"] - share - rank["straddling"]) for rank in whole), default=0)
        note = f"+{max(rank['straddling'] for rank in whole):,}, off by {off:,.0f}" if whole else ""
        print(f"| {ranks} | {row['precision']} | {row['stage']} | {' | '.join(cells)} | {note} |", flush=True)


def print_ratios(turns: dict[str, list[float]], paired: list[dict[str, list[float]]]) -> None:
    """What the strategy adds to the bare engine, batch by batch, and to DDP, round by round."""
    for stage, seconds in zip(STAGES, paired, strict=True):
        engine = compare(seconds)["ours"]
        ddp = compare({"ddp": turns["DDP"], "ours": turns[f"ZeROStrategy, stage {stage}"]})["ours"]
        cells = [f"{found.ratio:.3f} ({found.low:.3f} to {found.high:.3f})" for found in (engine, ddp)]
        print(f"| {stage} | {len(seconds['ours'])} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rank-of", type=Path)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank_main(arguments.rounds, arguments.batches, arguments.rank_of)
        return
    print(environment())
    print("| ranks | precision | stage | parameters | gradients | master | state | whole at a border |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    with TemporaryDirectory() as folder:
        for ranks in (1, 2) if arguments.quick else (1, 2, 4):
            print_bytes(ranks, launch(__file__, ranks, Path(folder) / f"{ranks}.json", "--rounds", "0"))
        rounds, batches = str(2 if arguments.quick else arguments.rounds), str(arguments.batches)
        found = launch(__file__, 2, Path(folder) / "timed.json", "--rounds", rounds, "--batches", batches)
    print(table("a step, 2 ranks", compare(found["turns"])) + "\n")
    print_ratios(found["turns"], found["pairs"])


if __name__ == "__main__":
    main()
