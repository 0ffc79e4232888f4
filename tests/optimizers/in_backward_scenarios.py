"""OptimizerInBackward on two ranks. Run as ``python -m tests.optimizers.in_backward_scenarios FOLDER NAME ...``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from lightning_accel import (
    ExactResume,
    FusedOptimizer,
    GradientClipping,
    GradualPruning,
    LearningRateFinder,
    LowBitOptimizer,
    OptimizerInBackward,
    RestartableDDPStrategy,
    ZeroRedundancyStrategy,
)
from tests.strategies.fully_shard_fits import RANK, Net, SaveAt, fit, shards
from tests.strategies.launch import serve


class Branches(Net):
    """A branch that one rank leaves out, then the other, then both; and one that none ever uses."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        uses = [(True, False), (False, True), (False, False), (True, True)][batch_idx % 4][RANK]
        loss = self.compute_loss((self.branch(x) if uses else x, y))
        self.losses.append(loss.item())
        return loss


class Images(Net):
    """Weights and buffers that differ between the ranks at first, and a convolution in ``channels_last``."""

    def __init__(self) -> None:
        super().__init__("sgd", extra="batchnorm")
        self.conv = nn.Conv2d(2, 2, 2, padding="same").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean, self.norm.running_var):
                tensor += 0.01 * RANK

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = self.compute_loss(
            (self.conv(x.view(-1, 2, 2, 2).contiguous(memory_format=torch.channels_last)).flatten(1), y)
        )
        self.losses.append(loss.item())
        return loss


class Unfreeze(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            pl_module.requires_grad_(True)


class Shuffled(Net):
    """Whose parameters are not in the order in which they are used."""

    def __init__(self) -> None:
        super().__init__()
        stem = self.stem
        del self.stem
        self.stem = stem


class Count(Callback):
    """The most gradients that were there when one arrived, in the second epoch."""

    most = 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch != 1:
            return
        parameters = list(pl_module.parameters())

        def look(_: Tensor) -> None:
            self.most = max(self.most, sum(parameter.grad is not None for parameter in parameters))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(look)


class Twice(Net):
    """Calls a block two times."""

    def compute_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.blocks[0](self.blocks[0](self.stem(x)))), y)


Made = Callable[[], Sequence[Callback]]


def both(
    strategy: Callable[[], Any] = lambda: "ddp",
    plain: Callable[[], Any] | None = None,
    callbacks: Made = list,
    **arguments: Any,
) -> Any:
    """The fit without and with the callback."""

    def acting() -> list[Callback]:
        return [*callbacks(), OptimizerInBackward()]

    without = fit((plain or strategy)(), callbacks=callbacks, **arguments)[2]
    trainer, _, inside = fit(strategy(), callbacks=acting, **arguments)
    assert all(parameter.grad is None for parameter in trainer.lightning_module.parameters())
    return {"plain": without, "in backward": inside}


def clipping(by: Any) -> Made:
    return lambda: [GradientClipping(0.01, by=by)]


def low_bit() -> list[Callback]:
    return [LowBitOptimizer(min_size=64), FusedOptimizer()]


def pruning() -> list[Callback]:
    return [GradualPruning(0.5, start=1, end=8, every=1)]


def finding() -> list[Callback]:
    return [LearningRateFinder(num_steps=10)]


SAME: dict[str, Callable[[], Any]] = {
    "ddp": both,
    "ddp, groups and momentum by OneCycleLR": partial(both, module=partial(Net, "sgd", "OneCycleLR")),
    "ddp, other weights and buffers at first": partial(both, module=Images),
    "ddp, tied": partial(both, module=partial(Net, extra="tied")),
    "ddp, frozen": partial(both, module=partial(Net, extra="frozen")),
    "ddp, branches": partial(both, plain=lambda: "ddp_find_unused_parameters_true", module=Branches),
    "ddp, low bit": partial(both, callbacks=low_bit),
    "ddp, pruning": partial(both, callbacks=pruning),
    "ddp, clipped by value": partial(both, callbacks=clipping("value")),
    "ddp, clipped by unit": partial(both, callbacks=clipping("adaptive")),
    "ddp, a rate found": partial(both, callbacks=finding),
    "ddp, bf16": partial(both, precision="bf16-mixed"),
    "accel_ddp, unfrozen later": partial(
        both, RestartableDDPStrategy, module=partial(Net, extra="frozen"), callbacks=lambda: [Unfreeze()]
    ),
    "fsdp2": partial(both, shards),
    "fsdp2, a parameter without dimensions": partial(both, shards, module=partial(Net, extra="temperature")),
    "fsdp2, tied": partial(both, shards, module=partial(Net, extra="tied")),
    "fsdp2, low bit": partial(both, shards, callbacks=low_bit),
    "fsdp2, clipped by value": partial(both, shards, callbacks=clipping("value")),
    "fsdp2, clipped by unit": partial(both, shards, callbacks=clipping("adaptive")),
    "fsdp2, a block twice": partial(both, shards, module=Twice),
    "fsdp2, offloaded": partial(both, partial(shards, offload=True)),
}


def resumed(strategy: Callable[[], Any], folder: Path) -> Any:
    """The whole fit, and what is resumed from its fifth batch; in both the order of sums is the same."""
    path = folder / "resumed.ckpt"

    def acting() -> list[Callback]:
        return [ExactResume(), OptimizerInBackward()]

    whole = fit(strategy(), callbacks=lambda: [*acting(), SaveAt(path, 5)])[2]
    return {"whole": whole, "resumed": fit(strategy(), callbacks=acting, ckpt_path=path, seed=9)[2]}


def counted(folder: Path) -> list[int]:
    plain, inside = Count(), Count()
    fit("ddp", Shuffled, callbacks=lambda: [plain])
    fit("ddp", Shuffled, callbacks=lambda: [OptimizerInBackward(), inside])
    return [plain.most, inside.most]


class Outside(Net):
    """Runs the closure before the step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        closure()
        optimizer.step()


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, sparse=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def compute_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return super().compute_loss((x + self.table(y), y))


REFUSED: dict[str, Callable[[], Any]] = {
    "a compressing hook": lambda: both(lambda: DDPStrategy(ddp_comm_hook=fp16_compress_hook)),
    "ZeroRedundancyStrategy": lambda: both(ZeroRedundancyStrategy),
    "a step without its closure": partial(both, module=Outside),
    "sparse gradients": partial(both, module=Sparse),
}


def refused(folder: Path) -> dict[str, str]:
    found = {}
    for name, run in REFUSED.items():
        try:
            run()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    serve(
        {
            **{name: lambda folder, run=run: run() for name, run in SAME.items()},  # type: ignore[misc]
            "resumed ddp": partial(resumed, lambda: "ddp"),
            "resumed fsdp2": partial(resumed, shards),
            "counted": counted,
            "refused": refused,
        }
    )
