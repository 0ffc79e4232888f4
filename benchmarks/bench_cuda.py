"""On a CUDA device: the step of each optimizer, and peak memory and time of the low-memory example's files.

python benchmarks/bench_cuda.py [--quick] [--rounds 15] [--only steps]

Steps: of 50 matrices of 1024 x 1024 and of 4 of 4096 x 4096, in turns, in a random order each round; a time is that of
several steps until the device is done. Memory: bytes that torch allocated above the model at most, from the first step
to the last, of the example's GPT with more and wider blocks; time is that of a batch until the device is done.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from _timing import compare, environment, interleaved, shuffled, table  # first: it sets the threads before torch

# isort: split
import bitsandbytes
import schedulefree
import torch
import torchao
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # the example names its files from there
from examples.low_memory.measure import FOLDER, SIDES, WatchedCLI  # noqa: E402
from lightning_accel.optimizers.bitsandbytes_state import use_bitsandbytes_  # noqa: E402
from lightning_accel.optimizers.muon import use_muon_  # noqa: E402
from lightning_accel.optimizers.quantized_state import quantize_optimizer_  # noqa: E402
from lightning_accel.optimizers.schedule_free_steps import to_training_, use_schedule_free_  # noqa: E402
from lightning_accel.optimizers.torchao_state import use_torchao_  # noqa: E402
from lightning_accel.report.sizes import optimizer_state_bytes  # noqa: E402
from lightning_accel.tuning.fake import quiet  # noqa: E402

Make = Callable[[list[nn.Parameter]], Optimizer]


def schedule_free(parameters: list[nn.Parameter]) -> Optimizer:
    optimizer = use_schedule_free_(torch.optim.AdamW(parameters))
    to_training_(optimizer)
    return optimizer


def schedule_free_directly(parameters: list[nn.Parameter]) -> Any:
    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=1e-3, weight_decay=0.01)
    optimizer.train()
    return optimizer


def of_torch(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters)


STEPS: dict[str, Make] = {
    "torch.optim.AdamW(fused=True)": partial(torch.optim.AdamW, fused=True),
    "torch.optim.AdamW": of_torch,
    "bitsandbytes.optim.AdamW8bit, called directly": bitsandbytes.optim.AdamW8bit,
    "LowBitOptimizer(), which takes bitsandbytes": lambda p: use_bitsandbytes_(of_torch(p)),
    "bitsandbytes.optim.PagedAdamW8bit, called directly": bitsandbytes.optim.PagedAdamW8bit,
    "LowBitOptimizer(paged=True)": lambda p: use_bitsandbytes_(of_torch(p), paged=True),
    "LowBitOptimizer(backend='generic')": lambda p: quantize_optimizer_(of_torch(p)),
    "LowBitOptimizer(4), which takes generic": lambda p: quantize_optimizer_(of_torch(p), bits=4),
    "LowBitOptimizer('fp8'), which takes generic": lambda p: quantize_optimizer_(of_torch(p), bits="fp8"),
    "LowBitOptimizer('bf16'), which takes generic": lambda p: quantize_optimizer_(of_torch(p), bits="bf16"),
    "torchao.optim.AdamW8bit, called directly": torchao.optim.AdamW8bit,
    "LowBitOptimizer(8, 'torchao')": lambda p: use_torchao_(of_torch(p)),
    "torchao.optim.AdamW4bit, called directly": torchao.optim.AdamW4bit,
    "LowBitOptimizer(4, 'torchao')": lambda p: use_torchao_(of_torch(p), bits=4),
    "torchao.optim.AdamWFp8, called directly": torchao.optim.AdamWFp8,
    "LowBitOptimizer('fp8', 'torchao')": lambda p: use_torchao_(of_torch(p), bits="fp8"),
    "torch.optim.Muon, called directly": lambda p: torch.optim.Muon(p, lr=1e-3, adjust_lr_fn="match_rms_adamw"),
    "Muon": lambda p: use_muon_(of_torch(p), p),
    "schedulefree.AdamWScheduleFree, called directly": schedule_free_directly,
    "ScheduleFree": schedule_free,
}


def repeated(step: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        step()
    torch.cuda.synchronize()


def print_steps(quick: bool, rounds: int, number: int, size: int) -> None:
    """The table of steps of so many square matrices."""
    sides: dict[str, Callable[[], Any]] = {}
    state = {}
    for name, make in STEPS.items():
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(size, size, device="cuda")) for _ in range(number)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        try:
            optimizer = make(parameters)
            optimizer.step()
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        state[name] = optimizer_state_bytes([optimizer]) / (number * size * size)
        sides[name] = partial(repeated, optimizer.step, 5)
    title = f"AdamW, {number} matrices of {size} x {size}, 5 steps"
    print(f"\n| {title} | bytes of state a parameter |\n| --- | ---: |")
    for name, count in state.items():
        print(f"| {name} | {count:.3f} |")
    print("\n" + table(title, interleaved(sides, 2 if quick else rounds)), flush=True)


class Watch(Callback):
    """Bytes that torch allocated above the model at most, of the optimizer's state, and seconds of each batch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parameters = sum(parameter.nbytes for parameter in pl_module.parameters())
        self.seconds: list[float] = []
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def on_train_batch_start(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.peak = torch.cuda.max_memory_allocated() - self.before
        self.state = 4 * optimizer_state_bytes(trainer.optimizers) / self.parameters


def fit(side: str, options: list[str]) -> Watch:
    watch = Watch()
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        command = ["fit", "--config", f"{FOLDER}/plain.yaml", *SIDES[side], "--trainer.accelerator=cuda", *options]
        WatchedCLI(command, watch)
    gc.collect()
    torch.cuda.empty_cache()
    return watch


def print_memory(quick: bool, rounds: int) -> None:
    """The tables of the example."""
    size = {"width": 256, "depth": 2, "heads": 4} if quick else {"width": 1024, "depth": 6, "heads": 16}
    options = [*(f"--model.{name}={value}" for name, value in size.items()), "--trainer.max_steps=10"]
    options += ["--data.batch_size=32", "--data.num_bytes=100000"]
    fit("plain", options)  # libraries make their workspaces
    found: dict[str, list[Watch]] = {side: [] for side in SIDES}
    for order in shuffled(list(SIDES), rounds):
        for side in order:
            found[side].append(fit(side, options))
    count = found["plain"][0].parameters // 4
    print(f"\n| {count:,} parameters | peak above the model, of its size | state, bytes a parameter |")
    print("| --- | ---: | ---: |")
    for side, watches in found.items():
        peak = statistics.median(watch.peak / watch.parameters for watch in watches)
        print(f"| {side} | {peak:.2f} | {watches[0].state:.3f} |")
    seconds = {side: [statistics.median(watch.seconds[3:]) for watch in watches] for side, watches in found.items()}
    print("\n" + table(f"a batch, {count:,} parameters", compare(seconds)), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and two rounds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("steps", "memory"), help="one of the two parts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures a CUDA device, and torch finds none here. The other benchmarks are for the CPU.")
    warnings.simplefilter("ignore")
    versions = f"bitsandbytes {bitsandbytes.__version__}, torchao {torchao.__version__}"
    print(f"{torch.cuda.get_device_name()}; {environment()}, {versions}", flush=True)
    if options.only != "memory":
        for number, size in [(4, 256)] if options.quick else [(50, 1024), (4, 4096)]:
            print_steps(options.quick, options.rounds, number, size)
            gc.collect()
            torch.cuda.empty_cache()
    if options.only != "steps":
        print_memory(options.quick, 1 if options.quick else max(1, options.rounds // 4))


if __name__ == "__main__":
    main()
