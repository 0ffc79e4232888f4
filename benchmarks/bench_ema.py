"""What EMA costs a step, beside Lightning's own, and what it gains on real images.

python benchmarks/bench_ema.py [--quick] [--seeds 5] [--epochs 10]

The step: the update of the averages alone, against AdamW's step, interleaved, one thread. The accuracy: the example's
unedited module and data, on 2,000 images; a seed decides the images, the initial weights and the order of the data, and
the trained weights' accuracy is compared with that of their average, seed by seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

from _timing import environment, interleaved, table  # first: it sets the threads before torch is imported

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "image_classification"))

# isort: split
import torch
from bench_mixup_accuracy import show
from data import ImageData
from lightning.pytorch import Trainer, seed_everything
from model import ImageClassifier
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, Subset

from lightning_accel import EMA
from lightning_accel.optimizers.averages import Averages
from lightning_accel.report.statistics import compute_verdict, difference, mean

MODULES = {"64 layers of 128 x 128": (128, 64), "6 layers of 1280 x 1280": (1280, 6)}


def time_updates(name: str, width: int, depth: int, rounds: int) -> str:
    module = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    plain = torch.optim.AdamW(module.parameters(), lr=1e-4)
    averages = Averages(module)
    averages.update(0.999)
    lightnings = AveragedModel(module, avg_fn=get_ema_avg_fn(0.999), use_buffers=True)
    lightnings.update_parameters(module)
    timings = interleaved(
        {
            "AdamW's step, torch's default": plain.step,
            "AdamW's step, fused": optimizer.step,
            "EMA's update": lambda: averages.update(0.999),
            "the update of Lightning's EMAWeightAveraging": lambda: lightnings.update_parameters(module),
        },
        rounds,
    )
    return table(name, timings)


class ConstantRate(ImageClassifier):
    """The example's module without its schedule."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)


RATES = {"rates that fall to 0 (OneCycleLR)": ImageClassifier, "a constant rate": ConstantRate}


def accuracies(
    kind: type[ImageClassifier], data: ImageData, seed: int, images: int, epochs: int
) -> tuple[float, float]:
    """The test accuracy of the trained weights, and of their average."""
    seed_everything(seed, verbose=False)
    chosen = torch.randperm(len(data.train))[:images].tolist()
    module, ema = kind(), EMA(decay=0.99, keep="trained")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, callbacks=[ema], **quiet)
    trainer.fit(module, DataLoader(Subset(data.train, chosen), batch_size=64, shuffle=True, drop_last=True))
    with_average = trainer.validate(module, data.val_dataloader(), verbose=False)[0]["val_acc"]
    plain = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    return plain.validate(module, data.val_dataloader(), verbose=False)[0]["val_acc"], with_average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds and one short run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(environment())
    for name, (width, depth) in MODULES.items():
        print(f"\n{time_updates(name, width, depth, 5 if arguments.quick else 60)}")
    seeds, epochs = (1, 1) if arguments.quick else (arguments.seeds, arguments.epochs)
    data = ImageData(val_images=5000)
    data.setup("fit")
    print(f"\n{data.name}: 2,000 images to train with, {len(data.val)} to test with, {epochs} epochs, {seeds} seeds\n")
    print("| accuracy, % (95% interval) | trained weights | their average | difference, by seed | |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name, kind in RATES.items():
        with contextlib.redirect_stdout(io.StringIO()):  # the plan
            pairs = [accuracies(kind, data, seed, 2000, epochs) for seed in range(seeds)]
        trained, averaged = ([100 * pair[side] for pair in pairs] for side in (0, 1))
        gain = difference(trained, averaged)
        verdict = compute_verdict(gain, 0, "higher")
        print(f"| {name} | {show(mean(trained))} | {show(mean(averaged))} | {show(gain, '+')} | {verdict} |")


if __name__ == "__main__":
    main()
