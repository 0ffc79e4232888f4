"""GradualPruning: CPU time of one mask update against Lightning's ModelPruning, and of an ordinary step against none.

python benchmarks/bench_pruning.py [--quick] [--rounds 7] [--millions 10 100]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

from _timing import compare, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import GradualPruning
from lightning_accel.pruning.masks import apply_masks_, compute_masks, count_pruned

LAYERS = 10


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def update_times(elements: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Of both sides, the CPU seconds of the first update (to 50%) and of the next (to 75%), which has masks already."""
    layers = nn.ModuleList(nn.Linear(1000, elements // LAYERS // 1000, bias=False) for _ in range(LAYERS))
    start = [layer.weight.detach().clone() for layer in layers]
    first: dict[str, list[float]] = {"ModelPruning": [], "GradualPruning": []}
    later: dict[str, list[float]] = {"ModelPruning": [], "GradualPruning": []}

    def theirs() -> None:
        callback = ModelPruning(
            "l1_unstructured",
            [(layer, "weight") for layer in layers],
            amount=0.5,
            use_lottery_ticket_hypothesis=False,
        )
        first["ModelPruning"].append(seconds(lambda: callback.apply_pruning(0.5))[0])
        later["ModelPruning"].append(seconds(lambda: callback.apply_pruning(0.5))[0])  # half of what is left
        for layer, weight in zip(layers, start, strict=True):
            prune.remove(layer, "weight")
            layer.weight.data.copy_(weight)

    def ours() -> None:
        weights = [layer.weight for layer in layers]

        def update(amount: float, masks: list[torch.Tensor] | None) -> list[torch.Tensor]:
            masks = compute_masks(weights, amount, masks=masks)
            apply_masks_(weights, masks)
            return masks

        took, masks = seconds(lambda: update(0.5, None))
        first["GradualPruning"].append(took)
        took, masks = seconds(lambda: update(0.75, masks))
        later["GradualPruning"].append(took)
        assert sum(map(count_pruned, masks)) == round(0.75 * sum(weight.numel() for weight in weights))
        for weight, value in zip(weights, start, strict=True):
            weight.data.copy_(value)

    for number in range(rounds):
        for side in (theirs, ours) if number % 2 else (ours, theirs):
            side()
            gc.collect()
    return first, later


class Clock(Callback):
    """CPU seconds from one batch's end to the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.process_time())

    def step_time(self) -> float:
        return statistics.median(b - a for a, b in zip(self.ends[5:], self.ends[6:], strict=False))


class Module(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in itertools.pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Module:
    layers: list[nn.Module] = []
    for width, following in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(width, following, 3, padding=1), nn.BatchNorm2d(following), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "convolutions, 113k weights, batch 64x3x32x32": (convnet, 64, (3, 32, 32)),
    "linear, 2.9M weights, batch 512": (lambda: mlp(784, 1024, 1024, 1024, 10), 512, (1, 28, 28)),
    "linear, 2.9M weights, batch 64": (lambda: mlp(784, 1024, 1024, 1024, 10), 64, (1, 28, 28)),
    "linear, 2k weights, batch 64": (lambda: mlp(64, 32, 10), 64, (1, 8, 8)),
}


def step_times(case: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Of both sides, the median step of each of ``rounds`` fits; with pruning, 90% is pruned from the third step on."""
    make, batch_size, shape = CASES[case]
    data = TensorDataset(torch.randn(batch_size, *shape), torch.randint(0, 10, (batch_size,)))
    loader = DataLoader(torch.utils.data.ConcatDataset([data] * steps), batch_size)
    times: dict[str, list[float]] = {"plain": [], "GradualPruning": []}
    for number in range(-1, rounds):
        for side in list(times)[:: 1 if number % 2 else -1]:
            clock = Clock()
            callbacks: list[Callback] = [clock]
            if side == "GradualPruning":
                callbacks.insert(0, GradualPruning(0.9, start=3, end=3))
            trainer = Trainer(
                accelerator="cpu",
                max_epochs=1,
                callbacks=callbacks,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            torch.manual_seed(0)
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit(Module(make()), loader)
            if number >= 0:
                times[side].append(clock.step_time())
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, updates of 1M weights")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--millions",
        type=int,
        nargs="*",
        default=[10, 100],
        help="weights of the updates; 100 needs about 4 GB of memory",
    )
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    print(environment())
    for millions in [1] if options.quick else options.millions:
        first, later = update_times(millions * 1_000_000, max(rounds // 2, 3) if millions > 50 else rounds)
        print("\n" + table(f"first update, {millions}M weights, 0 to 50%", compare(first)), flush=True)
        print("\n" + table(f"later update, {millions}M weights, 50 to 75%", compare(later)), flush=True)
    for case in CASES:
        print("\n" + table(f"one step: {case}", compare(step_times(case, rounds, 15 if options.quick else 40))))


if __name__ == "__main__":
    main()
