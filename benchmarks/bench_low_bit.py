"""LowBitOptimizer and FusedOptimizer: bytes of optimizer state and CPU time of a step, against bitsandbytes itself.

python benchmarks/bench_low_bit.py [--quick] [--rounds 21] [--only "10 matrices"]
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from typing import Any

from _timing import compare, cpu_seconds, environment, table  # first: it sets the threads before torch is imported

# isort: split
import bitsandbytes
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_accel.optimizers.bitsandbytes_state import use_bitsandbytes_
from lightning_accel.optimizers.fuse import use_fused_
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from lightning_accel.optimizers.torchao_state import use_torchao_
from lightning_accel.report.sizes import optimizer_state_bytes

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "10 matrices of 1000 x 1000": [(1000, 1000)] * 10,
    "50 matrices of 1000 x 1000": [(1000, 1000)] * 50,
    "4 matrices of 1024 x 1024": [(1024, 1024)] * 4,
    "64 matrices of 128 x 128 and 64 biases": [(128, 128), (128,)] * 64,
}
QUICK: dict[str, list[tuple[int, ...]]] = {"2 matrices of 128 x 128": [(128, 128)] * 2}


def fused(make: Callable[[Any], Optimizer], parameters: Any) -> Optimizer:
    optimizer = make(parameters)
    use_fused_(optimizer)
    return optimizer


def sides(name: str) -> dict[str, Callable[[Any], Optimizer]]:
    """Makers of one optimizer in each form; the first is what the others are compared with."""
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9} if name == "SGD" else {"lr": 1e-3}
    plain = getattr(torch.optim, name)
    own = getattr(bitsandbytes.optim, f"{name}8bit")
    return {
        f"torch.optim.{name}(fused=True)": lambda p: plain(p, fused=True, **options),
        f"bitsandbytes.optim.{name}8bit, called directly": lambda p: own(p, **options),
        "LowBitOptimizer(backend='bitsandbytes')": lambda p: use_bitsandbytes_(plain(p, **options)),
        "LowBitOptimizer(backend='generic')": lambda p: quantize_optimizer_(plain(p, **options)),
        "LowBitOptimizer(bits=4)": lambda p: quantize_optimizer_(plain(p, **options), bits=4),
        "LowBitOptimizer(bits='fp8')": lambda p: quantize_optimizer_(plain(p, **options), bits="fp8"),
        "LowBitOptimizer(bits='bf16')": lambda p: quantize_optimizer_(plain(p, **options), bits="bf16"),
        "LowBitOptimizer + FusedOptimizer": lambda p: quantize_optimizer_(fused(lambda q: plain(q, **options), p)),
        f"torch.optim.{name}": lambda p: plain(p, **options),
        f"torch.optim.{name}(foreach=True)": lambda p: plain(p, foreach=True, **options),
    }


TORCHAO: dict[str, Callable[[Any], Optimizer]] = {
    "LowBitOptimizer(backend='torchao')": lambda p: use_torchao_(torch.optim.AdamW(p)),
    "LowBitOptimizer(4, 'torchao')": lambda p: use_torchao_(torch.optim.AdamW(p), bits=4),
    "LowBitOptimizer('fp8', 'torchao')": lambda p: use_torchao_(torch.optim.AdamW(p), bits="fp8"),
}
"""For Adam and AdamW, in whole blocks; so slow on the CPU that one size is enough."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds on small matrices")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="run the sizes whose title has this in it, with AdamW alone")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{environment()}, bitsandbytes {bitsandbytes.__version__}")
    for name in ("AdamW",) if options.only else ("AdamW", "SGD"):
        for title, shapes in (QUICK if options.quick else SHAPES).items():
            if options.only not in title:
                continue
            steps: dict[str, Callable[[], Any]] = {}
            sizes = []
            torchao = TORCHAO if name == "AdamW" and set(shapes) == {(1024, 1024)} else {}
            for side, make in {**sides(name), **torchao}.items():
                torch.manual_seed(0)
                parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
                for parameter in parameters:
                    parameter.grad = torch.randn_like(parameter)
                optimizer = make(parameters)
                optimizer.step()
                count = sum(parameter.numel() for parameter in parameters)
                sizes.append(f"| {side} | {optimizer_state_bytes([optimizer]) / count:.3f} |")
                steps[side] = optimizer.step
            print(f"\n| {name}, {title} | bytes of state a parameter |\n| --- | ---: |")
            print("\n".join(sizes))
            print("\n" + table(f"{name}, {title}", compare(cpu_seconds(steps, 2 if options.quick else options.rounds))))
            gc.collect()


if __name__ == "__main__":
    main()
