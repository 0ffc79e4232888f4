"""Accuracy of a small network trained on 500 images, plain and with augmentation, over several seeds.

The example's unedited module and data are used. A seed decides the 500 images, the initial weights and the order of the
data, the same for all sides, so that each is compared with the plain run seed by seed.

python benchmarks/bench_mixup_accuracy.py [--quick] [--seeds 5] [--epochs 40]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

from _timing import environment, show  # first: it sets the threads before torch is imported

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "image_classification"))

# isort: split
import torch
from data import ImageData
from lightning.pytorch import Callback, Trainer, seed_everything
from model import ImageClassifier
from torch.utils.data import DataLoader, Subset

from lightning_accel import BatchAugmentation, LabelSmoothing
from lightning_accel.augment import CutMix, MixUp, RandomCrop, RandomHorizontalFlip
from lightning_accel.report.statistics import compute_verdict, difference, mean


def sides() -> dict[str, list[Callback]]:
    crop, flip = RandomCrop(28, padding=2), RandomHorizontalFlip()
    return {
        "plain": [],
        "LabelSmoothing(0.1)": [LabelSmoothing(0.1)],
        "MixUp(0.2)": [BatchAugmentation([MixUp(0.2)])],
        "MixUp(1.0)": [BatchAugmentation([MixUp(1.0)])],
        "CutMix(1.0)": [BatchAugmentation([CutMix(1.0)])],
        "crop": [BatchAugmentation([crop])],
        "crop + flip": [BatchAugmentation([crop, flip])],
        "crop + MixUp(0.2)": [BatchAugmentation([crop, MixUp(0.2)])],
    }


def accuracy(data: ImageData, callbacks: list[Callback], seed: int, images: int, epochs: int) -> float:
    seed_everything(seed, verbose=False)
    chosen = torch.randperm(len(data.train))[:images].tolist()
    module = ImageClassifier()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=callbacks,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the plan
        trainer.fit(module, DataLoader(Subset(data.train, chosen), 50, shuffle=True))
    module.eval()
    with torch.no_grad():
        right = [(module(x).argmax(1) == y).sum() for x, y in data.val_dataloader()]
    return 100 * float(sum(right)) / len(data.val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 seeds of 2 epochs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    seeds, epochs = (2, 2) if options.quick else (options.seeds, options.epochs)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    data = ImageData(val_images=5000)
    data.setup("fit")
    found: dict[str, list[float]] = {name: [] for name in sides()}
    for seed in range(seeds):
        for name, callbacks in sides().items():
            found[name].append(accuracy(data, callbacks, seed, options.images, epochs))
    print(f"{environment()}\n")
    numbers = f"{options.images} images to train with, {len(data.val)} to test with, {epochs} epochs, {seeds} seeds"
    print(f"{data.name}: {numbers}\n")
    print("| | accuracy, % (95% interval) | against plain, by seed | |\n| --- | ---: | ---: | --- |")
    for name, values in found.items():
        change = None if name == "plain" else difference(found["plain"], values)
        print(f"| {name} | {show(mean(values))} | {show(change, '+')} | {compute_verdict(change, 0, 'higher')} |")


if __name__ == "__main__":
    main()
