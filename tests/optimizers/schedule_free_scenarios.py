"""ScheduleFree on two ranks. Run as ``python -m tests.optimizers.schedule_free_scenarios FOLDER NAME ...``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_accel.durability.exact_resume import ExactResume
from lightning_accel.optimizers.schedule_free import ScheduleFree
from tests.strategies.fully_shard_fits import Net, SaveAt, data, fit, make_trainer, shards
from tests.strategies.launch import serve

STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp2": shards,
    "fsdp2 kept gathered": partial(shards, reshard_after_forward=False),
    "fsdp2 in one file": partial(shards, save_distributed_checkpoint=False),
}


def free() -> ScheduleFree:
    return ScheduleFree(warmup_steps=3, batch_norm_batches=2)


def fits(name: str, folder: Path) -> dict[str, Any]:
    """The fit, without validation, and resumed in the first epoch; then a plain test of what was saved."""
    strategy = STRATEGIES[name]
    path = folder / f"{name}.ckpt"
    module = partial(Net, extra="batchnorm")
    unvalidated = fit(strategy(), module, lambda: [free()], limit_val_batches=0)[2]
    whole = fit(strategy(), module, lambda: [free(), ExactResume(), SaveAt(path, 3)])[2]
    resumed = fit(strategy(), module, lambda: [free(), ExactResume()], ckpt_path=path, seed=5)[2]
    tested = make_trainer(strategy()).test(module(), data(16), ckpt_path=path, verbose=False)
    return {"unvalidated": unvalidated, "whole": whole, "resumed": resumed, "tested": tested[0]["val_loss"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({name: partial(fits, name) for name in STRATEGIES})
