"""How far accumulated training is from training on the big batches that it stands for, on real digits.

python benchmarks/bench_accumulation.py [--quick]

1,440 of scikit-learn's 8x8 digits: 45 batches of 32, so with a factor of 4 an epoch ends with a window of one batch.
The same samples in batches of 128 are the reference: 12 steps an epoch, the last one of 32 samples.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from _timing import environment  # first: it sets the threads before torch is imported

# isort: split
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_accel import GradientAccumulation

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, momentum 0.9": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


class Digits(LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


class Shuffled(Sampler[int]):
    """A new order each epoch, which does not depend on the batch size as RandomSampler's does."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).tolist())


def train(optimizer: str, seed: int, batch_size: int, epochs: int, **arguments: Any) -> tuple[Tensor, int]:
    """The weights after a fit, and its optimizer steps."""
    digits = load_digits()
    x, y = torch.tensor(digits.data[:1440] / 16, dtype=torch.float32), torch.tensor(digits.target[:1440])
    torch.manual_seed(seed)
    module = Digits(optimizer)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"accelerator": "cpu", "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, **quiet, **arguments)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size, sampler=Shuffled(len(x), seed)))
    return nn.utils.parameters_to_vector(module.parameters()).detach().double(), trainer.global_step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and one epoch, to see that it runs")
    quick = parser.parse_args().quick
    seeds, epochs = (1, 1) if quick else (5, 5)
    warnings.simplefilter("ignore")
    rows = []
    for optimizer in OPTIMIZERS:
        distances: dict[str, list[float]] = {}
        steps: dict[str, int] = {}
        for seed in range(seeds):
            big, steps["batches of 128"] = train(optimizer, seed, 128, epochs)
            sides: dict[str, dict[str, Any]] = {
                "Trainer(accumulate_grad_batches=4)": {"accumulate_grad_batches": 4},
                "GradientAccumulation(4)": {"callbacks": [GradientAccumulation(4)]},
            }
            for name, arguments in sides.items():
                weights, steps[name] = train(optimizer, seed, 32, epochs, **arguments)
                distances.setdefault(name, []).append(((weights - big).norm() / big.norm()).item())
        for name, values in distances.items():
            spread = f"{min(values):.1e} to {max(values):.1e}"
            rows.append(f"| {optimizer} | {name} | {steps[name]} | {statistics.median(values):.1e} | {spread} |")
    print(f"{environment()}\n\n{epochs} epochs, {seeds} seeds")
    print("| optimizer | batches of 32 with | steps | distance | over the seeds |")
    print("| --- | --- | ---: | ---: | ---: |", *rows, sep="\n")


if __name__ == "__main__":
    main()
