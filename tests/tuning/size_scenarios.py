"""BatchSizeFinder on two ranks, of which one runs out of memory alone; and the run after it against a configured one.

python -m tests.tuning.size_scenarios FOLDER NAME ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.durability.exact_resume import ExactResume
from lightning_accel.optimizers.in_backward import OptimizerInBackward
from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy
from lightning_accel.tuning.batch_size_finder import BatchSizeFinder
from tests.conformance.toy import Digits, Recorder, make_trainer, train_loader
from tests.strategies.launch import serve

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LIMITS = (11, 6)  # of each rank
FOUND = min(LIMITS)


class Alone(Digits):
    """Each rank runs out of memory at a size of its own: in the forward, the backward, or the optimizer's step.

    Beside it all collective operations that a module may have: metrics over ranks, features of all ranks.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.sizes: list[int] = []

    def run_out(self, *_: Any) -> Any:
        if self.sizes[-1] > LIMITS[RANK]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.sizes.append(len(batch[0]))
        features = self(batch[0]).mean(0)
        others = [torch.zeros_like(features) for _ in range(WORLD)]
        dist.all_gather(others, features.detach())
        if self.where == "forward":
            self.run_out()
        loss = super().training_step(batch, batch_idx) + (features - sum(others)).square().mean()
        self.log("over ranks", loss, sync_dist=True)
        self.all_gather(features)
        if self.where == "backward":
            self.head.weight.register_hook(self.run_out)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.where == "step":
            self.run_out()


def fitted(strategy: Any, make: Callable[[], Any], size: int, *callbacks: Any, **settings: Any) -> dict[str, Any]:
    os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD))  # a finished fit removes them
    seed_everything(7, verbose=False)
    module, recorder = make(), Recorder()
    settings = {"max_epochs": 2, "limit_val_batches": 0, "val_check_interval": None, **settings}
    trainer = make_trainer([*callbacks, recorder], strategy=strategy, devices=WORLD, **settings)
    trainer.fit(module, train_loader(batch_size=size))
    weights = [weight.detach().clone() for weight in module.parameters()]
    return {"weights": weights, "losses": list(recorder.trace.values()), "steps": trainer.global_step}


def found_and_configured(strategy: Callable[[], Any], where: str, other: Callable[[], Any], folder: Path) -> Any:
    finder = BatchSizeFinder(mode="binsearch", memory_budget="1GiB", steps_per_trial=2)
    module = partial(Alone, where)
    found = fitted(strategy(), module, 8, finder, other())
    assert finder.batch_size is not None
    configured = fitted(strategy(), module, finder.batch_size, other())
    results = [[str(value) for value in result.values()] for result in finder.results]
    return {"found": found, "configured": configured, "size": finder.batch_size, "results": results}


def counted(folder: Path) -> Any:
    """A real budget: DDP's buckets count as well."""
    peaks = []
    for strategy in ("ddp", "accel_ddp"):
        finder = BatchSizeFinder(max_size=2, memory_budget="1GiB", steps_per_trial=2)
        fitted(strategy, partial(Digits, scheduler=None), 8, finder, limit_train_batches=1, max_epochs=1)
        peaks.append(finder.results[-1]["peak"])
    return peaks


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "forward": partial(found_and_configured, lambda: "ddp", "forward", partial(GradientAccumulation, 2)),
    "backward": partial(found_and_configured, lambda: "accel_ddp", "backward", ExactResume),
    "step": partial(found_and_configured, lambda: "ddp", "step", partial(GradientAccumulation, 2)),
    "zero redundancy": partial(found_and_configured, ZeroRedundancyStrategy, "backward", ExactResume),
    "collectives in the backward": partial(found_and_configured, lambda: "ddp", "backward", OptimizerInBackward),
    "counted": counted,
}


if __name__ == "__main__":
    serve(SCENARIOS)
