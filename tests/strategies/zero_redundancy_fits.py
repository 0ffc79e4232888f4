"""What the tests of ZeroRedundancyStrategy fit: optimizers as users write them, and the same fit under DDP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim import Optimizer, lr_scheduler

import lightning_accel  # noqa: F401  # the name accel_zero1
from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.augment.label_smoothing import LabelSmoothing
from lightning_accel.optimizers.fused import FusedOptimizer
from lightning_accel.optimizers.low_bit import LowBitOptimizer
from lightning_accel.optimizers.low_bit_backend import BACKENDS
from lightning_accel.pruning.gradual import GradualPruning
from lightning_accel.strategies.registry import zero1
from lightning_accel.strategies.sharded_optimizer import ShardedOptimizer
from tests.strategies.fully_shard_fits import Gan, Net, fit

NAME = "accel_zero1"


class Lion(Optimizer):
    """As users write them: other arguments than torch's, a count in the group, state made in the step."""

    def __init__(self, parameters: Any, step_size: float, smoothing: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(parameters, {"lr": step_size, "betas": smoothing, "count": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["count"] += 1
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    parameter -= group["lr"] * torch.lerp(parameter.grad, average, first).sign()
                    average.lerp_(parameter.grad, 1 - second)
        return loss


class GroupNorm(Lion):
    """Keeps a norm over the gradients of all parameters in its groups, as Prodigy keeps its step size."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            norms = [parameter.grad.norm() for parameter in group["params"] if parameter.grad is not None]
            group["norm"] = float(sum(norms))
        return loss


class Twice(Lion):
    """Computes the loss twice a step, as SAM does."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            closure()
        return super().step(closure)


class OwnList(Lion):
    """Steps a list of parameters of its own."""

    def __init__(self, parameters: Any, step_size: float) -> None:
        super().__init__(parameters, step_size)
        self.own = [dict(group) for group in self.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        groups, self.param_groups = self.param_groups, self.own
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


Made = Callable[[list[dict[str, Any]]], Any]


class Other(Net):
    """With whatever ``make`` makes of two parameter groups."""

    def __init__(self, make: Made, extra: str = "") -> None:
        super().__init__(extra=extra)
        self.hparams.pop("make")  # no checkpoint holds a function
        self.make = make

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return self.make([{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "lr": 2e-3}])


def stepped(optimizer: Optimizer, kind: Callable[..., Any], **arguments: Any) -> Any:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": kind(optimizer, **arguments), "interval": "step"}}


def sequence(groups: Any) -> Any:
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    parts = [lr_scheduler.LinearLR(optimizer, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.8)]
    return stepped(optimizer, lambda _: lr_scheduler.SequentialLR(optimizer, parts, [4]))


def counted(groups: Any) -> Optimizer:
    """An optimizer with hooks of its own: an average of the weights after each step."""
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    first = groups[0]["params"][0]

    def add_average(stepping: Optimizer, *_: Any) -> None:
        everything = [parameter for group in stepping.param_groups for parameter in group["params"]]
        with torch.no_grad():
            first.add_(1e-3 * sum(parameter.mean() for parameter in everything))

    optimizer.register_step_post_hook(add_average)
    return optimizer


class Sparse(Net):
    """An embedding with sparse gradients, in an optimizer for those, and the rest in another."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.table = nn.Embedding(20, 8, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        loss = self.compute_loss((x + self.table(y), y))
        self.losses.append(loss.item())
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        rest = [parameter for name, parameter in self.named_parameters() if not name.startswith("table")]
        return torch.optim.SparseAdam(self.table.parameters(), lr=0.01), torch.optim.Adagrad(rest, lr=0.01)


class Held(Net):
    """Steps the optimizer that it has kept itself, with a rate that it sets itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.compute_loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss)
        for group in self.held.param_groups:
            group["lr"] = 0.01 / (1 + batch_idx)
        self.optimizers().step() if batch_idx % 2 else self.held.step()  # type: ignore[union-attr]
        self.held.zero_grad()

    def configure_optimizers(self) -> Any:
        self.held = torch.optim.AdamW(self.parameters())
        return self.held


def rounded() -> list[Callback]:
    return [LowBitOptimizer(4, min_size=64, bits_for={"head": "fp8"}, stochastic_rounding=True)]


LOW_BITS: dict[str, dict[str, Any]] = {
    **{
        f"low bit {backend}": {"callbacks": partial(lambda b: [LowBitOptimizer(backend=b, min_size=64)], backend)}
        for backend in BACKENDS
    },
    "low bit rounded": {"callbacks": rounded, "precision": "bf16-true"},
}
"""LowBitOptimizer in each of its ways."""


def both(strategy: Any = NAME, ddp: str = "ddp", **arguments: Any) -> dict[str, Any]:
    """The fit under DDP and under the strategy."""
    arguments = {"max_epochs": 1, **arguments}
    trainer, module, sharded = fit(strategy, **arguments)
    assert all(isinstance(optimizer, ShardedOptimizer) for optimizer in trainer.optimizers)
    assert all(config.scheduler.optimizer in trainer.optimizers for config in trainer.lr_scheduler_configs)
    assert "step" not in vars(getattr(module, "held", module))  # an optimizer that the module keeps is as before
    return {"ddp": fit(ddp, **arguments)[2], "sharded": sharded}


def of(make: Made, **arguments: Any) -> Callable[[], dict[str, Any]]:
    return partial(both, module=partial(Other, make), **arguments)


def methods() -> list[Callback]:
    return [LabelSmoothing(0.1), GradientAccumulation({0: 2, 1: 3}), FusedOptimizer(), GradualPruning(0.5)]


SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "sgd accumulated": partial(both, module=partial(Net, "sgd"), accumulate_grad_batches=2),
    "adamw clipped by norm": partial(both, gradient_clip_val=0.05),
    "sgd clipped by value": partial(
        both, module=partial(Net, "sgd"), gradient_clip_val=0.01, gradient_clip_algorithm="value"
    ),
    "lion": of(partial(Lion, step_size=1e-3)),
    "adagrad": of(partial(torch.optim.Adagrad, lr=1e-2)),
    "adafactor": of(partial(torch.optim.Adafactor, lr=3e-3)),
    "adamw fused": of(partial(torch.optim.AdamW, lr=3e-3, fused=True)),
    "hooks": of(counted),
    "OneCycleLR of momentum": of(
        lambda groups: stepped(
            torch.optim.SGD(groups, lr=0.1, momentum=0.9), lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=14
        )
    ),
    "OneCycleLR of betas": partial(both, module=partial(Net, "adamw", "OneCycleLR")),
    "warm restarts": of(
        lambda groups: stepped(
            torch.optim.AdamW(groups, lr=3e-3), lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2
        )
    ),
    "SequentialLR": of(sequence),
    "ReduceLROnPlateau": partial(both, module=partial(Net, "sgd", "ReduceLROnPlateau"), max_epochs=2),
    "tied": partial(both, module=partial(Net, extra="tied")),
    "frozen": partial(both, module=partial(Net, extra="frozen")),
    "batch norm": partial(both, module=partial(Net, extra="batchnorm")),
    "bf16-mixed": partial(both, precision="bf16-mixed"),
    "bf16-true": partial(both, precision="bf16-true"),
    "gan": lambda: both(zero1(find_unused_parameters=True), "ddp_find_unused_parameters_true", module=Gan),
    "sparse": partial(both, module=Sparse),
    "held": partial(both, module=Held),
    "methods": partial(both, callbacks=methods, max_epochs=2),
    **{name: partial(both, **arguments) for name, arguments in LOW_BITS.items()},
}
