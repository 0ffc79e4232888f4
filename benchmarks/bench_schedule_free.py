"""ScheduleFree: CPU time of a step and bytes of state, and what the image example learns with it and with its schedule.

python benchmarks/bench_schedule_free.py [--quick] [--rounds 21] [--seeds 5] [--steps 252]

The step: schedule-free AdamW through the callback's function and the package called directly, against AdamW of torch.
What is learned: the example's module and data; a seed decides the initial weights and the order of the data, the same
for all, and the loss on held-out data at the end is compared seed by seed. The warm-up is 5% of the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _timing import compare, cpu_seconds, environment, show, table  # first: it sets the threads before torch

# isort: split
import schedulefree
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.optim import AdamW, Optimizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from examples.image_classification.data import ImageData  # noqa: E402  # a folder beside this one
from examples.image_classification.model import ImageClassifier  # noqa: E402
from lightning_accel import EMA, ScheduleFree  # noqa: E402
from lightning_accel.optimizers.schedule_free_steps import (  # noqa: E402
    to_average_,
    to_training_,
    use_schedule_free_,
)
from lightning_accel.report.sizes import optimizer_state_bytes  # noqa: E402
from lightning_accel.report.statistics import compute_verdict, difference, mean  # noqa: E402

SHAPES = {
    "10 matrices of 1000 x 1000": [(1000, 1000)] * 10,
    "50 matrices of 1000 x 1000": [(1000, 1000)] * 50,
    "64 matrices of 128 x 128 and 64 biases": [(128, 128), (128,)] * 64,
}
QUICK = {"2 matrices of 128 x 128": [(128, 128)] * 2}


def directly(parameters: Any) -> Optimizer:
    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=1e-3, weight_decay=0.01)
    optimizer.train()
    made: Optimizer = optimizer
    return made


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "torch.optim.AdamW(fused=True)": lambda p: AdamW(p, fused=True),
    "torch.optim.AdamW": AdamW,
    "torch.optim.AdamW(foreach=True)": lambda p: AdamW(p, foreach=True),
    "schedulefree.AdamWScheduleFree, called directly": directly,
    "ScheduleFree": lambda p: use_schedule_free_(AdamW(p)),
    "ScheduleFree, of AdamW(foreach=False)": lambda p: use_schedule_free_(AdamW(p, foreach=False)),
}


def time_steps(title: str, shapes: list[tuple[int, ...]], rounds: int) -> None:
    steps: dict[str, Callable[[], Any]] = {}
    sizes = []
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer: Any = make(parameters)
        optimizer.step()
        count = sum(parameter.numel() for parameter in parameters)
        sizes.append(f"| {name} | {optimizer_state_bytes([optimizer]) / count:.3f} |")
        steps[name] = optimizer.step
        if name == "ScheduleFree":
            steps["to the average and back"] = lambda o=optimizer: (to_average_(o), to_training_(o))
        elif name.startswith("schedulefree"):
            steps["the package's eval() and train()"] = lambda o=optimizer: (o.eval(), o.train())
    print(f"\n| {title} | bytes of state a parameter |\n| --- | ---: |")
    print("\n".join(sizes))
    print("\n" + table(title, compare(cpu_seconds(steps, rounds))))
    gc.collect()


class Constant(ImageClassifier):
    """The example's module without its schedule."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)


def free(warmup: int, batches: int = 0) -> ScheduleFree:
    return ScheduleFree(warmup_steps=warmup, batch_norm_batches=batches)


SIDES: dict[str, tuple[type[ImageClassifier], float, Callable[[int], list[Callback]]]] = {
    "OneCycleLR to 0.003, the example's own": (ImageClassifier, 3e-3, lambda warmup: []),
    "OneCycleLR to 0.01": (ImageClassifier, 1e-2, lambda warmup: []),
    "a constant rate of 0.003": (Constant, 3e-3, lambda warmup: []),
    "the same with EMA(decay=0.99)": (Constant, 3e-3, lambda warmup: [EMA(decay=0.99)]),
    "ScheduleFree, 0.003": (Constant, 3e-3, lambda warmup: [free(warmup)]),
    "ScheduleFree, 0.01": (Constant, 1e-2, lambda warmup: [free(warmup)]),
    "the same, `batch_norm_batches=20`": (Constant, 1e-2, lambda warmup: [free(warmup, 20)]),
}


class Losses(Callback):
    """Keeps the loss on held-out data of each validation, and the accuracy of the last."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.accuracy = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found.append(float(trainer.callback_metrics["val_loss"]))
        self.accuracy = 100 * float(trainer.callback_metrics["val_acc"])


def learn(name: str, seed: int, steps: int) -> Losses:
    kind, rate, callbacks = SIDES[name]
    seed_everything(seed, verbose=False)
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[*callbacks(max(1, steps // 20)), losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=steps // 4,
        num_sanity_val_steps=0,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the plan
        trainer.fit(kind(lr=rate), datamodule=ImageData())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds on small matrices, and one seed of 20 steps")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=252, help="of learning; 0 leaves it out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"{environment()}, schedulefree {version('schedulefree')}")
    for title, shapes in (QUICK if options.quick else SHAPES).items():
        if options.rounds:
            time_steps(title, shapes, 2 if options.quick else options.rounds)
    seeds, steps = (1, 20) if options.quick else (options.seeds, options.steps)
    if not steps:
        return
    found = {name: [] for name in SIDES}  # type: dict[str, list[Losses]]
    for seed in range(seeds):
        for name in SIDES:
            found[name].append(learn(name, seed, steps))
    data = ImageData()
    data.setup("fit")
    print(f"\n{data}; {steps} steps, {seeds} seeds\n")
    print("| loss on held-out data | at a quarter | at half | at the end | the end, by seed | | accuracy, % |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: |")
    first = [losses.found[-1] for losses in found[next(iter(SIDES))]]
    for name, runs in found.items():
        last = [losses.found[-1] for losses in runs]
        change = None if last == first else difference(first, last)
        early = (show(mean([losses.found[at] for losses in runs]), digits=3) for at in (0, 1))
        cells = [
            *(name, *early, show(mean(last), digits=3), show(change, "+", 3)),
            *(compute_verdict(change, 0, "lower") if change else "", show(mean([run.accuracy for run in runs]))),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
