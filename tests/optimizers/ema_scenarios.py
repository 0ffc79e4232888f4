"""EMA on two ranks under the strategies. Run as ``python -m tests.optimizers.ema_scenarios FOLDER NAME ...``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_accel.optimizers.ema import EMA
from lightning_accel.strategies.zero import ZeROStrategy
from tests.strategies.fully_shard_fits import Net, SaveAt, data, fit, make_trainer, shards
from tests.strategies.launch import serve

STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "zero1": partial(ZeROStrategy, stage=1),
    "zero2": partial(ZeROStrategy, stage=2),
    # small parameters are kept whole by default: here no one is, there the biases are
    "zero3": partial(ZeROStrategy, stage=3, stage3={"persistence_threshold": 0}),
    "zero3 small ones whole": partial(ZeROStrategy, stage=3, stage3={"persistence_threshold": 40}),
    "zero3 offloaded": partial(ZeROStrategy, stage=3, offload_parameters="cpu", stage3={"persistence_threshold": 0}),
    "fsdp2": shards,
    "fsdp2 kept gathered": partial(shards, reshard_after_forward=False),
}


def ema() -> EMA:
    return EMA(decay=0.8, warmup=False)


def fits(name: str, folder: Path) -> dict[str, Any]:
    """The fit without EMA, with it, and resumed at the second epoch; then a test of what was saved."""
    strategy = STRATEGIES[name]
    path = folder / f"{name}.ckpt"
    module = partial(Net, extra="tied")
    plain = fit(strategy(), module)[2]
    whole = fit(strategy(), module, lambda: [ema(), SaveAt(path, 0)])[2]
    resumed = fit(strategy(), module, lambda: [ema()], ckpt_path=path, seed=5)[2]
    tested = make_trainer(strategy(), [ema()]).test(module(), data(16), ckpt_path=path, verbose=False)
    return {"plain": plain, "whole": whole, "resumed": resumed, "tested": tested[0]["val_loss"]}


def refused(folder: Path) -> list[str]:
    found = []
    for options in (
        {"offload_parameters": "nvme", "nvme_path": str(folder)},
        {"zero_plus_plus": {"hpz_partition_size": 2}},
    ):
        try:
            fit(ZeROStrategy(stage=3, **options), Net, lambda: [ema()])
        except Exception as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({**{name: partial(fits, name) for name in STRATEGIES}, "refused": refused})
