from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=2e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    "Adam L2": lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=1e-3),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=2e-3, amsgrad=True),
    "Adam maximize": lambda p: torch.optim.Adam(p, lr=2e-3, maximize=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "SGD dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=2e-3),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, lr=2e-4, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=2e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=4e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=2e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=2e-3),
}
WITHOUT_MOMENTS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True),
}


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def train(module: nn.Module, optimizer: Optimizer, steps: int, start: int = 0, scheduler: Any = None) -> list[float]:
    """Train on batches of digits that depend on the step alone; return the losses."""
    images, labels = digits()
    losses = []
    for step in range(start, start + steps):
        index = torch.randint(len(images), (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(images[index]), labels[index])
        (-loss if optimizer.param_groups[0].get("maximize") else loss).backward()
        optimizer.step()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss.item())
        elif scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def final(losses: list[float]) -> float:
    return statistics.mean(losses[-30:])


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
