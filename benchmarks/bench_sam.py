"""What SAM costs a step, and what it gains on real images, against the plain run and one of twice the length.

python benchmarks/bench_sam.py [--quick] [--part gain] [--seeds 5] [--epochs 40]

The step: whole fits in threads that take turns; the CPU time of a batch, one thread. The accuracy: the example's
unedited module and data, on 500 images; a seed decides the images, the initial weights and the order of the data, the
same for all sides, so that each is compared with the plain run seed by seed.
"""

from __future__ import annotations

import argparse
import logging
import random
import warnings
from collections.abc import Callable

from _timing import compare, environment, show, table  # first: it sets the threads before torch is imported

# isort: split
from bench_mixup_accuracy import ImageData, accuracy
from bench_overhead import MODULES, Side, count
from lightning.pytorch import Callback

from lightning_accel import SAM
from lightning_accel.report.statistics import compute_verdict, difference, mean

Make = Callable[[], list[Callback]]
COSTS: dict[str, Make] = {
    "plain": lambda: [],
    "SAM()": lambda: [SAM()],
    "SAM(every=2)": lambda: [SAM(every=2)],
    "SAM(every=5)": lambda: [SAM(every=5)],
    "SAM(adaptive=True)": lambda: [SAM(adaptive=True)],
}
GAINS: dict[str, tuple[Make, int]] = {
    "plain": (lambda: [], 1),
    "plain, twice the epochs": (lambda: [], 2),
    "SAM()": (lambda: [SAM()], 1),
    "SAM(rho=0.1)": (lambda: [SAM(rho=0.1)], 1),
    "SAM(rho=0.2)": (lambda: [SAM(rho=0.2)], 1),
    "SAM(rho=0.1, every=2)": (lambda: [SAM(rho=0.1, every=2)], 1),
    "SAM(rho=0.1, start='0.5fit')": (lambda: [SAM(rho=0.1, start="0.5fit")], 1),
    "SAM(adaptive=True)": (lambda: [SAM(adaptive=True)], 1),
}
"""The callbacks, and the factor of the number of epochs."""


def cost(name: str, rounds: int, batches: int = 10) -> str:
    """A table of the CPU time of a batch."""
    total = (rounds + 3) * batches + 1  # never reached: the threads end with the process
    sides = {side: Side(make(), *MODULES[name], batches, total) for side, make in COSTS.items()}
    seconds: dict[str, list[float]] = {side: [] for side in COSTS}
    shuffler = random.Random(0)
    for number in range(-2, rounds):
        for side in shuffler.sample(list(sides), k=len(sides)):
            used = sides[side].turn()
            if number >= 0:
                seconds[side].append(used)
    return table(count(name), compare(seconds))


def gains(seeds: int, images: int, epochs: int) -> str:
    """A table of the accuracy on held-out images."""
    data = ImageData(val_images=5000)
    data.setup("fit")
    found: dict[str, list[float]] = {name: [] for name in GAINS}
    for seed in range(seeds):
        for name, (make, longer) in GAINS.items():
            found[name].append(accuracy(data, make(), seed, images, longer * epochs))
    numbers = f"{images} images to train with, {len(data.val)} to test with, {epochs} epochs, {seeds} seeds"
    lines = [
        f"{data.name}: {numbers}\n",
        "| | accuracy, % (95% interval) | against plain, by seed | |\n| --- | ---: | ---: | --- |",
    ]
    for name, values in found.items():
        change = None if name == "plain" else difference(found["plain"], values)
        lines.append(
            f"| {name} | {show(mean(values))} | {show(change, '+')} | {compute_verdict(change, 0, 'higher')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds, and 2 seeds of 2 epochs")
    parser.add_argument("--part", choices=["cost", "gain"], help="one of them alone")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    seeds, epochs = (2, 2) if options.quick else (options.seeds, options.epochs)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(environment())
    if options.part != "cost":
        print(f"\n{gains(seeds, options.images, epochs)}", flush=True)
    for name, rounds in (("medium", 100), ("large", 20)):
        if options.part != "gain":
            print(f"\n{cost(name, 2 if options.quick else rounds)}", flush=True)


if __name__ == "__main__":
    main()
