"""OptimizerInBackward: the memory of a training step above the model, and its CPU time, against AdamW after the pass.

python benchmarks/bench_in_backward.py [--quick] [--rounds 11]

The model is a chain of linear layers of 1000 x 1000, the batch has 32 samples. Memory is how far the peak of the
process' resident memory lies above what it held with the model alone, over two steps in a process of their own. The
time is that of a whole step: forward, backward and optimizer, on one thread.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _timing import compare, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
from bench_low_bit import cpu_seconds
from torch import nn
from torch.optim import Optimizer

from lightning_accel.optimizers.in_backward import step_in_backward_
from lightning_accel.optimizers.quantized_state import quantize_optimizer_

BATCH = 32


def adamw(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, **options)


def low_bit(parameters: Any, bits: int) -> Optimizer:
    return quantize_optimizer_(adamw(parameters, fused=True), bits=bits)


SIDES: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW(fused=True)": lambda p: adamw(p, fused=True),
    "AdamW(foreach=True)": lambda p: adamw(p, foreach=True),
    "LowBitOptimizer()": lambda p: low_bit(p, 8),
    "OptimizerInBackward, AdamW(fused=True)": lambda p: step_in_backward_(adamw(p, fused=True)),
    "OptimizerInBackward, LowBitOptimizer()": lambda p: step_in_backward_(low_bit(p, 8)),
    "OptimizerInBackward, LowBitOptimizer(bits=4)": lambda p: step_in_backward_(low_bit(p, 4)),
}


def stepper(make: Callable[[Any], Optimizer], layers: int, width: int) -> Callable[[], Any]:
    """A training step of a new model."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = make(module.parameters())
    batch = torch.randn(BATCH, width)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(batch).square().mean()
        loss.backward()
        return loss.detach()

    return lambda: optimizer.step(closure)  # type: ignore[arg-type]


def status(name: str) -> int:
    """Bytes, from what the kernel tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak(side: str, layers: int, width: int) -> float:
    """How far the peak lies above the model, as a multiple of it."""
    warnings.filterwarnings("ignore")
    small = stepper(SIDES[side], 2, 128)  # whatever is loaded or made at first
    small()
    small()
    step = stepper(SIDES[side], layers, width)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    step()
    step()
    return (status("VmHWM") - before) / (4 * layers * width**2)


def measure_peak(side: str, layers: int, width: int) -> float:
    command = [sys.executable, __file__, "--side", side, "--layers", str(layers), "--width", str(width)]
    # whatever is freed is given back at once, in the place of being kept for later
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds of a small model")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(peak(options.side, options.layers, options.width))
        return
    warnings.filterwarnings("ignore")
    print(environment())
    for layers, width in [(4, 256)] if options.quick else [(10, 1000), (50, 1000)]:
        name = f"{layers} layers of {width} x {width}"
        print(f"\n| {name} | peak of memory above the model, as a multiple of it |\n| --- | ---: |")
        for side in SIDES:
            print(f"| {side} | {measure_peak(side, layers, width):.2f} |")
        steps = {side: stepper(make, layers, width) for side, make in SIDES.items()}
        print("\n" + table(name, compare(cpu_seconds(steps, 2 if options.quick else options.rounds))))
        del steps


if __name__ == "__main__":
    main()
