"""What each callback costs a training step in its neutral setting, against the plain Trainer.

python benchmarks/bench_overhead.py [--quick]

Every side is a whole `Trainer.fit` in a thread of its own. They take turns: one trains a few batches while the others
wait, so that the machine's noise falls on all alike. The CPU time of the thread is counted, not the wall clock.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from _timing import compare, environment  # first: it sets the threads before torch is imported

# isort: split
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    BatchAugmentation,
    ExactResume,
    FusedOptimizer,
    GradientAccumulation,
    GradualPruning,
    LabelSmoothing,
    LowBitOptimizer,
)
from lightning_accel.augment import MixUp

SIDES: dict[str, Callable[[], list[Callback]]] = {
    "plain Trainer": lambda: [],
    "an empty Lightning callback": lambda: [Callback()],
    "BatchAugmentation (MixUp(alpha=0))": lambda: [BatchAugmentation([MixUp(alpha=0.0)])],
    "LabelSmoothing(0)": lambda: [LabelSmoothing(0.0)],
    "GradientAccumulation(1)": lambda: [GradientAccumulation(1)],
    "GradualPruning(0)": lambda: [GradualPruning(0.0)],
    "FusedOptimizer(enabled=False)": lambda: [FusedOptimizer(enabled=False)],
    "LowBitOptimizer (all below min_size)": lambda: [LowBitOptimizer(min_size=10**9)],
    "ExactResume": lambda: [ExactResume()],
}
MODULES = {"small": (64, 2), "large": (1280, 6)}
"""Width and number of hidden layers."""
EPOCH = 256
"""Batches of 32 samples in an epoch."""


class Classifier(LightningModule):
    """A multi-layer perceptron with AdamW."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Side(Callback):
    """A fit in a thread, that trains ``batches`` more whenever it is asked to."""

    def __init__(self, callbacks: list[Callback], width: int, depth: int, batches: int, total: int) -> None:
        self.batches, self.left, self.used = batches, 0, 0.0
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        torch.manual_seed(0)
        module = Classifier(width, depth)
        data = TensorDataset(torch.randn(EPOCH * 32, width), torch.randint(0, 10, (EPOCH * 32,)))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_steps=total,
            enable_model_summary=False,
            callbacks=[*callbacks, self],
            **quiet,  # type: ignore[arg-type]
        )
        self.thread = threading.Thread(target=trainer.fit, args=(module, DataLoader(data, batch_size=32)), daemon=True)
        self.thread.start()
        self.done.acquire()

    def on_train_start(self, *_: Any) -> None:
        self.wait()

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.used = time.thread_time() - self.began
            self.wait()

    def wait(self) -> None:
        self.done.release()
        self.go.acquire()
        self.left, self.began = self.batches, time.thread_time()

    def turn(self) -> float:
        """Train and return the CPU seconds a batch."""
        self.go.release()
        self.done.acquire()
        return self.used / self.batches


def measure(width: int, depth: int, batches: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds a batch of each side, one number a round."""
    warmup, shuffler = 3, random.Random(0)
    total = (rounds + warmup + 1) * batches + 1  # never reached: the threads end with the process
    sides = {name: Side(make(), width, depth, batches, total) for name, make in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(-warmup, rounds):
        for name in shuffler.sample(list(sides), k=len(sides)):
            used = sides[name].turn()
            if number >= 0:
                seconds[name].append(used)
    return seconds


def main() -> None:
    """Print a table for each module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    print(environment())
    for name, (width, depth) in MODULES.items():
        batches, rounds = {"small": (32, 300), "large": (1, 120)}[name]
        seconds = measure(width, depth, batches, 4 if quick else rounds)
        timings = compare(seconds)
        empty = compare({"empty": seconds["an empty Lightning callback"], **seconds})
        parameters = sum(p.numel() for p in Classifier(width, depth).parameters())
        print(
            f"\n| {name} module, {parameters:,} parameters | ms a batch | to the plain Trainer | to an empty callback |"
        )
        print("| --- | ---: | ---: | ---: |")
        for side, timing in timings.items():
            ratios = (f"{one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})" for one in (timing, empty[side]))
            print(f"| {side} | {timing.median * 1e3:.3f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
