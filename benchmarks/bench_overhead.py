"""What each callback costs a training step in its neutral setting, against the plain Trainer.

python benchmarks/bench_overhead.py [--quick]

Every side is a whole `Trainer.fit` in a thread of its own. They take turns: one trains a few batches while the others
wait, so that the machine's noise falls on all alike. The CPU time of the thread is counted, not the wall clock.
Then the hooks of each callback are called alone, many times over, as the Trainer calls them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from _timing import compare, environment  # first: it sets the threads before torch is imported

# isort: split
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.call import _call_callback_hooks
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
    MicroBatching,
)
from lightning_accel.augment import MixUp

SIDES: dict[str, Callable[[], list[Callback]]] = {
    "plain Trainer": lambda: [],
    "plain Trainer again": lambda: [],
    "an empty Lightning callback": lambda: [Callback()],
    "BatchAugmentation (MixUp(alpha=0))": lambda: [BatchAugmentation([MixUp(alpha=0.0)])],
    "LabelSmoothing(0)": lambda: [LabelSmoothing(0.0)],
    "GradientAccumulation(1)": lambda: [GradientAccumulation(1)],
    "MicroBatching(32), of batches of 32": lambda: [MicroBatching(32)],
    "MicroBatching(), auto": lambda: [MicroBatching()],
    "GradualPruning(0)": lambda: [GradualPruning(0.0)],
    "FusedOptimizer(enabled=False)": lambda: [FusedOptimizer(enabled=False)],
    "LowBitOptimizer (all below min_size)": lambda: [LowBitOptimizer(min_size=10**9)],
    "ExactResume": lambda: [ExactResume()],
}
MODULES = {"small": (64, 2), "medium": (256, 4), "large": (1280, 6)}
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


def make_trainer(callbacks: list[Callback], **limits: int) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, callbacks=callbacks, **quiet, **limits)


class Side(Callback):
    """A fit in a thread, that trains ``batches`` more whenever it is asked to."""

    def __init__(self, callbacks: list[Callback], width: int, depth: int, batches: int, total: int) -> None:
        self.batches, self.left, self.used = batches, 0, 0.0
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        torch.manual_seed(0)
        module = Classifier(width, depth)
        data = TensorDataset(torch.randn(EPOCH * 32, width), torch.randint(0, 10, (EPOCH * 32,)))
        trainer = make_trainer([*callbacks, self], max_epochs=-1, max_steps=total)
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


class Replay(Callback):
    """In the second batch, time the other callbacks' hooks of a batch: microseconds a batch, the median of 200."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self.others, self.microseconds = callbacks, 0.0

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            every, optimizer = trainer.callbacks, trainer.optimizers[0]  # type: ignore[attr-defined]
            hooks: dict[str, tuple[Any, ...]] = {
                "on_train_batch_start": (batch, batch_idx),
                "on_before_zero_grad": (optimizer,),
                "on_before_backward": (torch.zeros(()),),
                "on_after_backward": (),
                "on_before_optimizer_step": (optimizer,),
                "on_train_batch_end": (outputs, batch, batch_idx),
            }

            def run(callbacks: list[Callback], transfer: Callable[..., Any]) -> float:
                trainer.callbacks = callbacks  # type: ignore[attr-defined]
                began = time.thread_time()
                for _ in range(20):
                    transfer(batch, 0)
                    for name, arguments in hooks.items():
                        _call_callback_hooks(trainer, name, *arguments)
                return (time.thread_time() - began) / 20 * 1e6

            # what the class has is what the Trainer would call without the patch of a BatchTransform
            plain = LightningModule.on_after_batch_transfer.__get__(module)
            own = [callback for callback in every if callback in self.others]
            differences = [run(own, module.on_after_batch_transfer) - run([], plain) for _ in range(200)]
            self.microseconds = statistics.median(differences)
            trainer.callbacks = every  # type: ignore[attr-defined]


def hooks_alone(make: Callable[[], list[Callback]], width: int, depth: int) -> float:
    """Microseconds a batch of the hooks of these callbacks."""
    callbacks = make()
    replay = Replay(callbacks)
    data = TensorDataset(torch.randn(96, width), torch.randint(0, 10, (96,)))
    trainer = make_trainer([*callbacks, replay], max_epochs=1)
    trainer.fit(Classifier(width, depth), DataLoader(data, batch_size=32))
    return replay.microseconds


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    print(environment())
    plans = contextlib.redirect_stdout(io.StringIO())
    with plans:
        alone = {side: [hooks_alone(make, *shape) for shape in MODULES.values()] for side, make in SIDES.items()}
    for name, batches, rounds in (("small", 32, 300), ("medium", 16, 200)):
        with plans:
            seconds = measure(*MODULES[name], batches, 4 if quick else rounds)
        timings = compare(seconds)
        empty = compare({"empty": seconds["an empty Lightning callback"], **seconds})
        print(f"\n| {count(name)} | ms a batch | to the plain Trainer | to an empty callback |")
        print("| --- | ---: | ---: | ---: |")
        for side, timing in timings.items():
            ratios = (f"{one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})" for one in (timing, empty[side]))
            print(f"| {side} | {timing.median * 1e3:.3f} | {' | '.join(ratios)} |")
    print(f"\n| hooks alone, us a batch | {' | '.join(map(count, MODULES))} |")
    print("| --- | ---: | ---: | ---: |")
    for side, microseconds in alone.items():
        print(f"| {side} | {' | '.join(f'{value:.1f}' for value in microseconds)} |")


def count(name: str) -> str:
    """The name of a module with its number of parameters."""
    return f"{name} module, {sum(p.numel() for p in Classifier(*MODULES[name]).parameters()):,} parameters"


if __name__ == "__main__":
    main()
