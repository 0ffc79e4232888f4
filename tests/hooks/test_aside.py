"""Batches that are run forward on the side leave no trace, whenever that is in a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_accel.hooks.aside import forward_aside
from tests.conformance.toy import Digits, assert_same_training, run
from tests.hooks.common import Stop
from tests.methods import STACKS

HOOKS = ("on_train_start", "on_train_batch_end", "on_validation_start", "on_validation_batch_end", "on_train_end")
COUNT = 2
SEEN: list[tuple[Any, ...]] = []
"""What training steps on the side saw; not in the module, where nothing of it would be left."""


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()


class Looks(Digits):
    """Writes down what a training step sees, with metrics, dropout, batch norm and a logger of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.aside:
            state = (self.trainer.training, self.norm.training, torch.is_grad_enabled(), loss.is_inference())
            SEEN.append((*state, type(self.trainer.logger).__name__, float(loss.detach())))
        self.trainer.logger.log_metrics({"by_hand": 0.0})  # type: ignore[union-attr]
        return loss


class Aside(Callback):
    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.calls = 0

    def go(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Looks)
        if trainer.sanity_checking:
            return
        self.calls += 1
        metrics = dict(trainer.callback_metrics)
        try:
            with forward_aside(trainer, pl_module, COUNT) as steps:
                pl_module.aside = True
                for _ in steps:
                    torch.rand(1)
                    if self.fails:
                        raise Stop
        except Stop:
            pass
        assert not pl_module.aside
        assert trainer.callback_metrics == metrics


def _hook(name: str) -> Any:
    def hook(self: Aside, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.go(trainer, pl_module)

    hook.__name__ = name
    return hook


for name in HOOKS:
    setattr(Aside, name, _hook(name))


def lines(logger: CSVLogger) -> int:
    logger.save()
    return len(Path(logger.experiment.metrics_file_path).read_text().splitlines())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("stack", [False, True], ids=["alone", "with everything"])
def test_it_leaves_no_trace(tmp_path: Any, fails: bool, stack: bool) -> None:
    results = []
    for number in range(2):
        callbacks = STACKS[-1].make() if stack else []
        aside, logger = Aside(fails), CSVLogger(tmp_path / str(number))
        ran = run([*callbacks, *([aside] if number else [])], Looks, logger=logger, log_every_n_steps=1)
        results.append((ran, lines(logger), {key: float(v) for key, v in ran.trainer.callback_metrics.items()}))
    assert_same_training(results[0][0], results[1][0], "with forwards on the side")
    assert results[0][1:] == results[1][1:]
    assert aside.calls > 40
    assert len(SEEN) == aside.calls * (1 if fails else COUNT)
    assert {state[:-1] for state in SEEN} == {(True, True, False, False, "DummyLogger")}
