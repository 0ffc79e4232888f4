"""NoiseScaleAccumulation: whether its estimate is right, what it takes, and what a batch that grows is worth.

python benchmarks/bench_noise_scale.py [--quick]

Estimate: a network on scikit-learn's 8x8 digits (1,440, batches of 16), whose weights stand still (a rate of 0) after
0, 60 and 600 steps of training. The direct value takes the gradient of every sample.

Time: CPU time of a window of 4 batches; whole fits take turns in a random order.

Worth: optimizer steps and samples until the mean loss of all 1,440 digits is below a target, at fixed factors and with
one that grows, three seeds; SGD, whose rate follows the batch size linearly (no other setting differs).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from _timing import compare, environment, shuffled, table  # first: it sets the threads before torch is imported

# isort: split
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import GradientAccumulation, NoiseScaleAccumulation

BATCH, SAMPLES = 16, 1440
SETTINGS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images[:SAMPLES], dtype=torch.float32)[:, None] / 16, torch.tensor(data.target[:SAMPLES])


class Net(LightningModule):
    def __init__(self, rate: float, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 10)
        self.rate = rate

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.net(x)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def fit(module: LightningModule, *callbacks: Callback, seed: int = 0, **settings: Any) -> Trainer:
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(*digits()), batch_size=BATCH, shuffle=True)
    trainer = Trainer(callbacks=list(callbacks), **SETTINGS, **settings)
    trainer.fit(module, loader)
    return trainer


def direct_noise_scale(module: Net) -> float:
    """tr(Sigma) / |G|^2 in samples, from the gradient of every sample."""
    x, y = digits()
    total, squares = 0.0, 0.0
    for n in range(SAMPLES):
        module.zero_grad()
        module.loss(x[n : n + 1], y[n : n + 1]).backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters()]).double()  # type: ignore[union-attr]
        total, squares = total + gradient, squares + float(gradient.square().sum())
    mean = total / SAMPLES
    signal = float(mean.square().sum())  # type: ignore[attr-defined]
    return (squares / SAMPLES - signal) / signal


def estimates(quick: bool) -> None:
    print("| trained for | direct | estimated at factor 2 | at factor 8 |\n| ---: | ---: | ---: | ---: |")
    for steps in (0, 60) if quick else (0, 60, 600):
        found: dict[int, list[float]] = {2: [], 8: []}
        direct = []
        for seed in range(3):
            torch.manual_seed(seed)
            module = Net(0.1)
            if steps:
                fit(module, seed=seed, max_steps=steps, max_epochs=-1)
            direct.append(direct_noise_scale(module))
            module.rate = 0.0
            for factor, values in found.items():
                growing = NoiseScaleAccumulation(factor, factor, smoothing=0.999)
                fit(module, growing, seed=100 + seed, max_steps=300, max_epochs=-1)
                values.append(growing.noise_scale * BATCH)
        row = [direct, found[2], found[8]]
        print(f"| {steps} steps | " + " | ".join(", ".join(f"{v:.0f}" for v in values) for values in row) + " |")


class Clock(Callback):
    """CPU seconds of each window after the first few."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began: float | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        if self._began is None:
            self._began = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if (trainer.fit_loop.total_batch_idx + 1) % 4 == 0 and self._began is not None:
            self.seconds.append(time.process_time() - self._began)
            self._began = None


def timing(quick: bool) -> None:
    sides: dict[str, Callable[[], Callback]] = {
        "`GradientAccumulation(4)`": lambda: GradientAccumulation(4),
        "the same again": lambda: GradientAccumulation(4),
        "`NoiseScaleAccumulation(4, 4)`": lambda: NoiseScaleAccumulation(4, 4),
        '`NoiseScaleAccumulation(4, 4, scale_lr="sqrt")`': lambda: NoiseScaleAccumulation(4, 4, scale_lr="sqrt"),
    }
    for width in (64, 2000):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for order in shuffled(list(sides), 4 if quick else 9):
            for name in order:
                clock = Clock()
                fit(Net(0.01, width), sides[name](), clock, max_steps=20, max_epochs=-1)
                seconds[name].append(statistics.median(clock.seconds[3:]))
        size = sum(p.numel() for p in Net(0.01, width).parameters())
        print(table(f"a window of 4 batches of {BATCH}, {size / 1e6:.2f}M parameters", compare(seconds)), "\n")


class Target(Callback):
    """Stops at a loss over all samples, looked at every ten batches."""

    def __init__(self, loss: float, most: int) -> None:
        self.loss, self.most = loss, most
        self.x, self.y = digits()
        self.samples = self.steps = 0
        self.reached = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.samples += BATCH
        self.steps = trainer.global_step
        if self.samples % (10 * BATCH) == 0:
            with torch.no_grad():
                self.reached = float(pl_module.loss(self.x, self.y)) < self.loss
            trainer.should_stop = self.reached or self.samples > self.most


def worth(quick: bool) -> None:
    rate = 0.02  # of one batch
    sides: dict[str, tuple[Callable[[], Callback], float]] = {
        **{f"factor {k}": (lambda k=k: GradientAccumulation(k), rate * k) for k in (2, 8, 32)},
        "grows from 2 to at most 32": (
            lambda: NoiseScaleAccumulation(2, 32, every=10, smoothing=0.9, scale_lr="linear"),
            rate * 2,
        ),
    }
    for target in (0.5, 0.1):
        print(f"\n| to a loss of {target} | steps | samples | factor at the end |\n| --- | ---: | ---: | ---: |")
        for name, (make, lr) in sides.items():
            runs = []
            for seed in range(1 if quick else 3):
                torch.manual_seed(seed)
                module, callback, stop = Net(lr), make(), Target(target, 60 * SAMPLES)
                fit(module, callback, stop, seed=seed, max_epochs=200)
                steps = str(stop.steps) if stop.reached else "never"
                runs.append((steps, str(stop.samples), str(getattr(callback, "factor", name.split()[-1]))))
            print(f"| {name} | " + " | ".join(", ".join(column) for column in zip(*runs, strict=True)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and seeds")
    quick = parser.parse_args().quick
    print(environment(), "\n")
    estimates(quick)
    print()
    timing(quick)
    worth(quick)


if __name__ == "__main__":
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
