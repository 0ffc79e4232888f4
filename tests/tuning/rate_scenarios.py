"""LearningRateFinder on several ranks: what it finds, and the run after it against one configured with that.

python -m tests.tuning.rate_scenarios FOLDER NAME ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from torch.distributed.tensor import DTensor

from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy
from lightning_accel.tuning.learning_rate_finder import LearningRateFinder
from tests.conformance.toy import Recorder, make_trainer, train_loader
from tests.strategies.launch import serve
from tests.tuning.test_learning_rate_finder import TwoRates, finder

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp2": FullyShardStrategy,
    "zero redundancy": ZeroRedundancyStrategy,
}


def fitted(strategy: str, search: LearningRateFinder | None, rate: float = 3e-3) -> dict[str, Any]:
    os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(WORLD))  # a finished fit removes them
    seed_everything(7, verbose=False)
    module, recorder = TwoRates("LambdaLR", rate), Recorder()
    callbacks = [*([search] if search else []), GradientAccumulation(2), recorder]
    settings = {"max_epochs": 1, "limit_train_batches": 7, "val_check_interval": None, "num_sanity_val_steps": 0}
    trainer = make_trainer(callbacks, strategy=STRATEGIES[strategy](), devices=WORLD, **settings)
    trainer.fit(module, train_loader(batch_size=4))
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return {"weights": [weight.detach().clone() for weight in weights], "losses": list(recorder.trace.values())}


def scenario(strategy: str, folder: Path) -> Any:
    search = finder(num_steps=20)
    found = fitted(strategy, search)
    assert search.rate is not None
    return {"found": found, "rate": search.rate, "configured": fitted(strategy, None, search.rate)}


SCENARIOS: dict[str, Callable[[Path], Any]] = {name: partial(scenario, name) for name in STRATEGIES}


if __name__ == "__main__":
    serve(SCENARIOS)
