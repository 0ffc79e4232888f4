"""Two ranks on the CPU: every method under every strategy that splits the training, in one launch.

    python -m tests.conformance.strategies FOLDER NAME ...

as :mod:`tests.strategies.launch` starts it. Each name is of a strategy and a row, ``"zero2: FusedOptimizer"``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch.distributed.tensor import DTensor

from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.zero import ZeROStrategy
from tests.conformance import sharded_resume
from tests.conformance.toy import BATCH_SIZE, Digits, Recorder, make_trainer, train_loader, val_loader
from tests.methods import METHODS, STACKS, Method, build, use
from tests.strategies.launch import serve

RANKS = 2
POINT = ("train batch end", 14)  # in mid-epoch, and in the middle of a window of two and of four
EXACT = use("ExactResume")

STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "zero1": lambda: ZeROStrategy(stage=1),
    "zero2": lambda: ZeROStrategy(stage=2),
    # small parameters are not split by default
    "zero3": lambda: ZeROStrategy(stage=3, config={"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
    "fsdp2": FullyShardStrategy,
}


class Unbiased(Digits):
    """Without the bias before batch norm: its gradient is nothing but rounding, which AdamW makes large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3, padding=1, bias=False)


def fit(strategy: str, callbacks: list[Callback], *, resume: Path | None = None, save: Path | None = None) -> Any:
    """Losses and weights of two epochs of nine batches a rank."""
    seed_everything(7, verbose=False)
    if resume is not None:
        torch.manual_seed(99)  # other weights and another random state than in the run that was interrupted
    recorder = Recorder({save: POINT} if save is not None else None)
    module = Unbiased()
    trainer = make_trainer(
        [*callbacks, recorder],
        strategy=STRATEGIES[strategy](),
        devices=RANKS,
        max_epochs=2,
        val_check_interval=None,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    train = train_loader(batch_size=BATCH_SIZE // RANKS)
    trainer.fit(module, train, val_loader(), ckpt_path=resume)
    losses = {str(batch): loss for batch, loss in recorder.trace.items()}
    return {"losses": losses, "rates": [rate for _, rate in recorder.rates], "weights": whole_weights(module)}


def whole_weights(module: LightningModule) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in module.named_parameters()
    }


def run(strategy: str, method: Method, folder: Path) -> Any:
    """What the method does there: the run, the run resumed, and the one with neutral settings."""
    specs = method.callbacks if EXACT in method.callbacks else [*method.callbacks, EXACT]
    save = folder / f"{strategy} {method.name}.ckpt"
    found = {"whole": fit(strategy, [build(spec) for spec in specs], save=save)}
    if strategy != "ddp":
        found["resumed"] = fit(strategy, [build(spec) for spec in specs], resume=save)
        if method.neutral is not None:
            found["neutral"] = fit(strategy, method.make(neutral=True))
    return found


def plain(strategy: str, folder: Path) -> Any:
    return fit(strategy, [])


ROWS = {method.name: method for method in [*METHODS, *STACKS]}
SCENARIOS = {
    **{f"{strategy}: plain": partial(plain, strategy) for strategy in STRATEGIES},
    **{f"{strategy}: {name}": partial(run, strategy, row) for strategy in STRATEGIES for name, row in ROWS.items()},
    **sharded_resume.SCENARIOS,
}

if __name__ == "__main__":
    serve(SCENARIOS)
