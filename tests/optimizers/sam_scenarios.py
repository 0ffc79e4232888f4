"""SAM in windows on two ranks. Run as ``python -m tests.optimizers.sam_scenarios FOLDER NAME ...``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.durability.exact_resume import ExactResume
from lightning_accel.optimizers.sam import SAM
from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy
from tests.strategies.fully_shard_fits import Net, SaveAt, fit, shards
from tests.strategies.launch import serve

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "zero redundancy": ZeroRedundancyStrategy,
    "fsdp2": shards,
    "fsdp2 kept gathered": partial(shards, reshard_after_forward=False),
}
WINDOW, SAVED = 3, 5  # batches in a window, and those done when a checkpoint is saved: two of the second window


def callbacks() -> list[Callback]:
    """A perturbation that a wrong norm or direction would show in."""
    return [SAM(rho=0.5, adaptive=True), GradientAccumulation(WINDOW), ExactResume()]


def module() -> Net:
    """With a parameter without dimensions, which can't be sharded."""
    return Net("sgd", extra="temperature")


def whole_and_resumed(name: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.ckpt"
    whole = fit(STRATEGIES[name](), module, lambda: [*callbacks(), SaveAt(path, SAVED)])[2]
    return {"whole": whole, "resumed": fit(STRATEGIES[name](), module, callbacks, ckpt_path=path, seed=5)[2]}


if __name__ == "__main__":
    serve({name: partial(whole_and_resumed, name) for name in STRATEGIES})
