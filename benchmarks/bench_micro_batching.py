"""What MicroBatching does when memory runs out, what it saves, and what it takes.

python benchmarks/bench_micro_batching.py [--quick]

Failures: 1,792 of scikit-learn's 8x8 digits on two ranks (processes, gloo, DDP), in batches of 64 on each; a network
with dropout and AdamW. 200 times an out-of-memory error is raised at a random micro-batch of a random rank, in its
forward or its backward. Each epoch begins with whole batches again. The reference is a run without failures, whose
batches are split from the start as those of the first run were in the end. Samples are counted by what steps returned.

Memory and time: a transformer on one process; the most bytes at a time that the forwards and backwards of a batch hold
beside the weights, and CPU time of a batch. The sides take turns, a fit at a time, in a random order.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _timing import compare, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
import torch.distributed as dist
from _ranks import RANK, RANKS, TOKENS, WIDTH, Model, Watch, launch, restore_environment, take_turns
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import MicroBatching
from lightning_accel.accumulation.auto_size import AutoSize
from lightning_accel.hooks.memory import LiveBytes

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}
SAMPLES, BATCH, CHANCE = 1792, 64, 0.2


# ----------------------------------------------------------------------------------------------------------- failures


class Failures:
    """Raises so many errors, at random, where there is more than one sample to split."""

    def __init__(self, count: int, seed: int) -> None:
        self.left, self.random, self.found = count, random.Random(seed), Counter[str]()

    def maybe(self, output: Tensor) -> None:
        if not self.left or len(output) == 1 or self.random.random() >= CHANCE:
            return
        self.left -= 1
        where = self.random.choice(("forward", "backward"))
        self.found[where] += 1
        if where == "forward":
            raise torch.OutOfMemoryError("out of memory: injected")

        def fail(_: Tensor) -> None:
            raise torch.OutOfMemoryError("out of memory: injected")

        output.register_hook(fail)  # type: ignore[no-untyped-call]


class Digits(LightningModule):
    def __init__(self, failures: Failures | None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.3), nn.Linear(96, 96), nn.ReLU())
        self.head = nn.Linear(96, 10)
        self.failures = failures

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y, numbers = batch
        hidden = self.net(x)
        if self.failures is not None:
            self.failures.maybe(hidden)
        return {"loss": nn.functional.cross_entropy(self.head(hidden), y), "numbers": numbers}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Sizes(Callback):
    """Begins each epoch with whole batches, or sets the size of each batch; and writes down what was trained."""

    def __init__(self, micro: MicroBatching, given: list[int | None] | None = None) -> None:
        self.micro, self.given = micro, given
        self.found: list[int | None] = []
        self.numbers: list[list[int]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.micro.load_state_dict(dict(AutoSize().state_dict()))
        self.numbers.append([])

    def on_train_batch_start(self, *_: Any) -> None:
        if self.given is not None:
            self.micro.load_state_dict({**AutoSize().state_dict(), "size": self.given[len(self.found)]})

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.found.append(self.micro.size)
        self.numbers[-1] += outputs["numbers"].tolist()


def train(epochs: int, failures: Failures | None, given: list[int | None] | None) -> tuple[Tensor, Sizes]:
    """The weights after a fit, and how it was split."""
    digits, micro = load_digits(), MicroBatching("auto")
    x, y = torch.tensor(digits.data[:SAMPLES] / 16, dtype=torch.float32), torch.tensor(digits.target[:SAMPLES])
    sizes = Sizes(micro, given)
    restore_environment()
    seed_everything(0, verbose=False)
    trainer = Trainer(max_epochs=epochs, devices=RANKS, strategy="ddp", callbacks=[micro, sizes], **QUIET)
    module = Digits(failures)
    torch.manual_seed(RANK)  # the ranks have other dropout
    trainer.fit(module, DataLoader(TensorDataset(x, y, torch.arange(SAMPLES)), BATCH, shuffle=True))
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone(), sizes


def rank_main(out: Path, quick: bool) -> None:
    """What each rank does; rank 0 writes what all found."""
    each, epochs = (5, 2) if quick else (100, 40)
    failures = Failures(each, seed=RANK)
    weights, sizes = train(epochs, failures, None)
    same, again = train(epochs, None, sizes.found)
    own = {"failures": failures.found, "sizes": sizes.found, "numbers": sizes.numbers}
    own |= {"equal": torch.equal(weights, same), "distance": float((weights - same).abs().max())}
    own |= {"same numbers": sizes.numbers == again.numbers}
    restore_environment()
    every: list[Any] = [None] * RANKS
    dist.init_process_group("gloo") if not dist.is_initialized() else None
    dist.all_gather_object(every, own)
    two: dict[str, Callable[[], list[Callback]]] = {
        "DDP": lambda: [],
        "DDP again": lambda: [],
        "`MicroBatching(32)`": lambda: [MicroBatching(32)],
        "`MicroBatching()`, auto": lambda: [MicroBatching()],
    }
    turns = {name: partial(seconds, make, 4) for name, make in two.items()}
    times = take_turns(turns, 1 if quick else 15)
    if RANK == 0:
        out.write_text(json.dumps({"ranks": every, "times": times}))


def print_failures(quick: bool) -> None:
    """The table of failures."""
    with TemporaryDirectory() as folder:
        found = launch(__file__, 2, Path(folder) / "found.json", *(["--quick"] if quick else []))
    ranks = found["ranks"]
    epochs = [
        Counter(number for rank in ranks for number in rank["numbers"][n]) for n in range(len(ranks[0]["numbers"]))
    ]
    whole = set(range(SAMPLES))
    rows = {
        "errors raised, in the forward / in the backward": " / ".join(
            str(sum(rank["failures"].get(where, 0) for rank in ranks)) for where in ("forward", "backward")
        ),
        "on rank 0 / on rank 1": " / ".join(str(sum(rank["failures"].values())) for rank in ranks),
        "batches of each rank, of which split": f"{len(ranks[0]['sizes'])}, "
        f"{sum(size is not None for size in ranks[0]['sizes'])}",
        "sizes at which they were trained": ", ".join(
            str(size or BATCH) for size in sorted({size or BATCH for size in ranks[0]["sizes"]}, reverse=True)
        ),
        "both ranks had the same sizes": all(rank["sizes"] == ranks[0]["sizes"] for rank in ranks),
        "final weights equal to those of the run split so from the start": all(rank["equal"] for rank in ranks),
        "largest difference of a weight": max(rank["distance"] for rank in ranks),
        "samples lost / seen twice, over all epochs": " / ".join(
            str(count)
            for count in (
                sum(len(whole - epoch.keys()) for epoch in epochs),
                sum(sum(epoch.values()) - len(epoch) for epoch in epochs),
            )
        ),
    }
    print("\n| two ranks, errors injected | |\n| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {({True: 'yes', False: 'no'}[value]) if isinstance(value, bool) else value} |")
    assert all(rank["equal"] and rank["same numbers"] for rank in ranks)
    assert all(epoch.keys() == whole and sum(epoch.values()) == SAMPLES for epoch in epochs)
    print()
    print(table(f"two ranks, a batch of {LARGE} on each, whole", compare(found["times"])))


# ---------------------------------------------------------------------------------------------------- memory and time

LARGE = 32
SIDES: dict[str, Callable[[], list[Callback]]] = {
    "plain Trainer": lambda: [],
    "plain Trainer again": lambda: [],
    **{f"`MicroBatching({size})`": lambda size=size: [MicroBatching(size)] for size in (32, 16, 8, 4, 2)},
    "`MicroBatching()`, auto, memory is enough": lambda: [MicroBatching()],
    "`MicroBatching(memory_budget=...)`, which is enough": lambda: [MicroBatching(memory_budget="100GiB")],
}


class Peak(Callback):
    """The most bytes that live from a batch's start to its optimizer step."""

    def __init__(self) -> None:
        self.peak = 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.live = LiveBytes(known=[*module.parameters(), *module.buffers(), batch])
        self.live.__enter__()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.live.__exit__(None, None, None)
        self.peak = max(self.peak, self.live.peak)


def fit(callbacks: list[Callback], batches: int, **options: Any) -> None:
    torch.manual_seed(0)
    data = torch.randn(LARGE * batches, TOKENS, WIDTH)
    trainer = Trainer(max_epochs=1, callbacks=callbacks, **QUIET, **options)
    with contextlib.redirect_stdout(io.StringIO()):  # the plan
        trainer.fit(Model(), DataLoader(data, LARGE))  # type: ignore[arg-type]


def seconds(make: Callable[[], list[Callback]], batches: int) -> list[float]:
    watch = Watch()
    if RANKS > 1:
        restore_environment()
    fit([*make(), watch], batches * RANKS, devices=RANKS, strategy="ddp" if RANKS > 1 else "auto")
    return watch.seconds


def print_memory_and_time(quick: bool) -> None:
    """The table of bytes and times."""
    peaks = {}
    for name, make in SIDES.items():
        if "enough" not in name and "again" not in name:
            watch = Peak()
            fit([*make(), watch], 1, devices=1)
            peaks[name] = watch.peak
    print(f"\n| batches of {LARGE}, {TOKENS} tokens each | MiB in the step | of the plain Trainer's |")
    print("| --- | ---: | ---: |")
    for name, peak in peaks.items():
        print(f"| {name} | {peak / 2**20:.1f} | {peak / peaks['plain Trainer']:.2f} |")
    turns = {name: partial(seconds, make, 4) for name, make in SIDES.items()}
    parameters = sum(parameter.numel() for parameter in Model().parameters())
    print()
    print(table(f"a batch of {LARGE}, {parameters:,} parameters", compare(take_turns(turns, 2 if quick else 15))))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 failures and two rounds, to see that it runs")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.rank_of is not None:
        rank_main(options.rank_of, options.quick)
        return
    print(environment())
    print_failures(options.quick)
    print_memory_and_time(options.quick)


if __name__ == "__main__":
    main()
