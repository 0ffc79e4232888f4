"""BatchAugmentation (crop, flip, MixUp) against kornia doing the same to the same batches.

Interleaved, in CPU time on one thread.

python benchmarks/bench_augmentation.py [--quick] [--shape 128 3 32 32]
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from _timing import Timing, compare, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
from torch.nn import functional as F

from lightning_accel.augment import (
    BatchAugmentation,
    CutMix,
    MixUp,
    RandomCrop,
    RandomHorizontalFlip,
    mix_targets,
)
from lightning_accel.hooks import batch_generator


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """As ``_timing.interleaved``, in CPU time: one thread that never waits, so a busy machine does not blur it."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffler = list(functions), random.Random(0)
    for number in range(-3, rounds):
        shuffler.shuffle(order)
        for name in order:
            began = time.thread_time()
            functions[name]()
            if number >= 0:
                seconds[name].append(time.thread_time() - began)
    return compare(seconds)


def ours(transforms: list[Any], x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    callback = BatchAugmentation(transforms)
    return lambda: callback.transform_batch((x, y), batch_generator(0, 0, 0, callback.state_key))


def kornia(names: list[str], x: torch.Tensor, y: torch.Tensor, padding: int) -> Callable[[], Any]:
    import kornia.augmentation as K

    size = (x.shape[-2], x.shape[-1])
    made = {
        "crop": lambda: K.RandomCrop(size, padding=padding),
        "flip": lambda: K.RandomHorizontalFlip(p=0.5),
        "mixup": lambda: K.RandomMixUpV2(p=1.0, data_keys=["input", "class"]),
        "cutmix": lambda: K.RandomCutMixV2(p=1.0, data_keys=["input", "class"], use_correct_lambda=True),
    }
    # kornia's containers refuse transforms that change the label, so those come after
    geometry = K.AugmentationSequential(
        *[made[name]() for name in names if name in ("crop", "flip")], data_keys=["input"]
    )
    mixing = [made[name]() for name in names if name in ("mixup", "cutmix")]

    def call() -> Any:
        out = geometry(x) if len(mixing) < len(names) else x
        return mixing[0](out, y) if mixing else out

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--shape", type=int, nargs=4, default=[128, 3, 32, 32], metavar=("B", "C", "H", "W"))
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    rounds = 5 if options.quick else options.rounds
    warnings.filterwarnings("ignore", module="kornia")

    import kornia as library

    torch.manual_seed(0)
    x, y = torch.rand(options.shape), torch.randint(0, 10, (options.shape[0],))
    size, padding = list(x.shape[-2:]), x.shape[-1] // 8
    crop, flip, mixup, cutmix = RandomCrop(size, padding=padding), RandomHorizontalFlip(), MixUp(1.0), CutMix(1.0)
    print(f"{environment()}, kornia {library.__version__}; batches of {'x'.join(map(str, options.shape))}\n")
    sides = {
        "crop + flip + MixUp": ([crop, flip, mixup], ["crop", "flip", "mixup"]),
        "crop": ([crop], ["crop"]),
        "flip": ([flip], ["flip"]),
        "MixUp": ([mixup], ["mixup"]),
        "CutMix": ([cutmix], ["cutmix"]),
    }
    for name, (transforms, names) in sides.items():
        functions = {"BatchAugmentation": ours(transforms, x, y), "kornia": kornia(names, x, y, padding)}
        print(table(name, interleaved(functions, rounds)), end="\n\n")
    for name, transform in {"MixUp": MixUp(1.0, per_sample=True), "CutMix": CutMix(1.0, per_sample=True)}.items():
        functions = {"one draw a batch": ours([type(transform)(1.0)], x, y), "one a sample": ours([transform], x, y)}
        print(table(name, interleaved(functions, rounds)), end="\n\n")

    logits = torch.randn(options.shape[0], 10, requires_grad=True)
    indices, each = torch.rand(len(y)).argsort(), torch.rand(len(y))
    mixed, mixed_each = mix_targets(y, indices, torch.tensor(0.3)), mix_targets(y, indices, each)
    soft = F.one_hot(mixed, 10)
    functions = {
        "hard target": lambda: F.cross_entropy(logits, y),
        "mixed, one share": lambda: F.cross_entropy(logits, mixed),
        "mixed, a share a sample": lambda: F.cross_entropy(logits, mixed_each),
        "soft vector": lambda: F.cross_entropy(logits, soft),
    }
    print(table("`F.cross_entropy` of (B, 10)", interleaved(functions, rounds * 10), unit=1e-6, unit_name="us"))


if __name__ == "__main__":
    main()
