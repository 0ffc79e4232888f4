"""CPU time of a step of Muon, and of what EMA, GradientClipping and SAM add to a step, beside torch's own classes.

python benchmarks/bench_optimizer_steps.py [--quick] [--part muon] [--rounds 9]

At 10 and 50 million parameters. Muon's bfloat16 products take minutes a step on a CPU without instructions for them, so
that its rounds are few; smaller matrices have all rounds. It is compared with torch.optim.Muon alone: the memory of an
AdamW that waits for minutes is cold, and its step in the first tables is not. SAM's part is what it computes itself,
without the second forward and backward, for which see bench_sam.py. For other optimizers see bench_low_bit.py,
bench_in_backward.py and bench_schedule_free.py.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

from _timing import compare, cpu_seconds, environment, table  # first: it sets the threads before torch is imported

# isort: split
import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_accel.optimizers.averages import Averages
from lightning_accel.optimizers.gradient_clipping import clip_units_
from lightning_accel.optimizers.muon import use_muon_
from lightning_accel.optimizers.sam import perturb_, restore_


def layers(number: int, size: int) -> nn.Sequential:
    """So many square matrices with gradients."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(number)))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    return module


def muon_steps(number: int, size: int) -> dict[str, Callable[[], Any]]:
    """The step of Muon's matrices alone."""
    direct, ours = (list(layers(number, size).parameters()) for _ in range(2))
    return {
        "torch.optim.Muon, called directly": torch.optim.Muon(direct, lr=1e-3, adjust_lr_fn="match_rms_adamw").step,
        "Muon": use_muon_(torch.optim.AdamW(ours), ours, adjust_lr_fn="match_rms_adamw").step,
    }


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
    adamw = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    clip = Precision().clip_gradients  # what the Trainer calls, with what GradientClipping sets

    def climb_and_return(rho: float, adaptive: set[nn.Parameter]) -> None:
        before = [parameter.detach().clone() for parameter in parameters]
        perturb_(parameters, rho, adaptive)
        restore_(parameters, before)

    return {
        "torch.optim.AdamW(fused=True)": adamw.step,
        "EMA's update": lambda: averages.update(0.999),
        "torch's AveragedModel, get_ema_multi_avg_fn": lambda: many.update_parameters(module),
        "torch's AveragedModel, get_ema_avg_fn (Lightning's default)": lambda: single.update_parameters(module),
        "GradientClipping(by='norm')": lambda: clip(adamw, 1e9, GradClipAlgorithmType.NORM),
        "torch.nn.utils.clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(parameters, 1e9),
        "GradientClipping(by='value')": lambda: clip(adamw, 1e9, GradClipAlgorithmType.VALUE),
        "torch.nn.utils.clip_grad_value_": lambda: nn.utils.clip_grad_value_(parameters, 1e9),
        "GradientClipping(by='adaptive')": lambda: clip_units_(parameters, 0.01),
        "the copy of the weights that SAM makes": lambda: [parameter.detach().clone() for parameter in parameters],
        "SAM's climb and return": lambda: climb_and_return(0.05, set()),
        "SAM's climb and return, adaptive": lambda: climb_and_return(0.5, set(parameters)),
    }


def show(number: int, size: int, sides: dict[str, Callable[[], Any]], rounds: int, warmup: int) -> None:
    """Print a table."""
    seconds = cpu_seconds(sides, rounds, warmup)
    print("\n" + table(f"{number} matrices of {size} x {size}", compare(seconds)), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds on small matrices")
    parser.add_argument("--part", choices=["muon", "additions"], help="one of them alone")
    parser.add_argument("--rounds", type=int, default=9, help="of Muon's steps at most 2 at 10 million, 1 at 50")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(environment())
    rounds = 2 if options.quick else options.rounds
    if options.part != "muon":
        for number, size in [(2, 128)] if options.quick else [(10, 1000), (50, 1000)]:
            show(number, size, additions(number, size), rounds, 2)
    if options.part != "additions":
        show(10, 200, muon_steps(10, 200), rounds, 1)
        for number, most in [] if options.quick else [(10, 2), (50, 1)]:
            show(number, 1000, muon_steps(number, 1000), min(rounds, most), 0)


if __name__ == "__main__":
    main()
