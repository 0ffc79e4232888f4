"""CPU time of a step of Muon, and of what EMA and GradientClipping add to a step, beside torch's own classes.

python benchmarks/bench_optimizer_steps.py [--quick] [--rounds 9]

At 10 and 50 million parameters. Muon's bfloat16 products take minutes a step on a CPU without instructions for them, so
that its rounds are few. Clipping by norm and by value is the Trainer's own, which calls torch's functions. For other
optimizers see bench_low_bit.py, bench_in_backward.py, bench_schedule_free.py and bench_sam.py.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from _timing import compare, cpu_seconds, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_accel.optimizers.averages import Averages
from lightning_accel.optimizers.gradient_clipping import clip_units_
from lightning_accel.optimizers.muon import use_muon_


def layers(number: int, size: int) -> nn.Sequential:
    """So many square matrices with gradients."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(number)))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    return module


def muon_steps(number: int, size: int) -> dict[str, Callable[[], Any]]:
    """The step of Muon's matrices alone."""
    sides: dict[str, Callable[[], Any]] = {}
    optimizers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "torch.optim.AdamW(fused=True)": partial(torch.optim.AdamW, fused=True),
        "torch.optim.Muon, called directly": partial(torch.optim.Muon, lr=1e-3, adjust_lr_fn="match_rms_adamw"),
        "Muon": lambda parameters: use_muon_(torch.optim.AdamW(parameters), parameters),
    }
    for name, make in optimizers.items():
        sides[name] = make(list(layers(number, size).parameters())).step
    next(iter(sides.values()))()  # where its state is made, which would show
    return sides


def additions(number: int, size: int) -> dict[str, Callable[[], Any]]:
    """What comes to a step."""
    module = layers(number, size)
    parameters = list(module.parameters())
    averages = Averages(module)
    averages.update(0.999)
    single = AveragedModel(module, avg_fn=get_ema_avg_fn(0.999))
    many = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    for average in (single, many):
        average.update_parameters(module)
    return {
        "torch.optim.AdamW(fused=True)": torch.optim.AdamW(parameters, lr=1e-6, fused=True).step,
        "EMA's update": lambda: averages.update(0.999),
        "torch's AveragedModel, get_ema_multi_avg_fn": lambda: many.update_parameters(module),
        "torch's AveragedModel, get_ema_avg_fn (Lightning's default)": lambda: single.update_parameters(module),
        "GradientClipping(by='adaptive')": lambda: clip_units_(parameters, 0.01),
        "torch.nn.utils.clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(parameters, 1e9),
        "torch.nn.utils.clip_grad_value_": lambda: nn.utils.clip_grad_value_(parameters, 1e9),
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds on small matrices")
    parser.add_argument("--rounds", type=int, default=9, help="of Muon's steps at most 2 and 1")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(environment())
    rounds = 2 if options.quick else options.rounds
    for number, size in [(2, 128)] if options.quick else [(10, 1000), (50, 1000)]:
        title = f"{number} matrices of {size} x {size}"
        for sides, count, warmup in (
            (muon_steps(number, size), min(rounds, 2 if number < 50 else 1), 0),
            (additions(number, size), rounds, 2),
        ):
            print("\n" + table(title, compare(cpu_seconds(sides, count, warmup))), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
