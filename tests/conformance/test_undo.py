"""After a fit, and after an exception in it, the Trainer and the module are as any fit leaves them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything

from tests.conformance.cases import SAMPLE, cases, wrong
from tests.conformance.toy import Digits, DigitsData, assert_same_training, make_trainer, run
from tests.methods import Method

# Says how the training went or has addresses in it: not how the objects are set up.
COUNTERS = {"_batches_that_stepped", "_metric_attributes", "_update_count"}


class Boom(Exception):
    """What goes wrong in the middle of an epoch."""


class FailingDigits(Digits):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.current_epoch == 1 and batch_idx == 5:
            raise Boom
        return super().training_step(batch, batch_idx)


def owners(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule) -> Iterator[tuple[str, Any]]:
    """Every object that a method may have patched, and a name for it."""
    loop = trainer.fit_loop.epoch_loop
    yield "trainer", trainer
    yield "datamodule", datamodule
    yield "fit_loop", trainer.fit_loop
    yield "epoch_loop", loop
    yield "val_loop", loop.val_loop
    yield "automatic_optimization", loop.automatic_optimization
    yield "manual_optimization", loop.manual_optimization
    yield "strategy", trainer.strategy
    yield "precision", trainer.strategy.precision_plugin
    for name, value in vars(trainer).items():
        if name.endswith("_connector"):
            yield name, value
    for loader in (trainer.train_dataloader, trainer.val_dataloaders):
        yield "loader", loader
    for name, child in module.named_modules():
        yield f"module.{name}", child


def describe(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule, logs: Collection[str] = ()
) -> dict[str, str]:
    """What the objects are made of: classes, plain settings, functions, hooks; not the numbers that were trained.

    Metrics named in ``logs`` are left out.
    """
    found = {}
    for name, owner in owners(trainer, module, datamodule):
        found[name] = type(owner).__qualname__
        for key, value in vars(owner).items():
            if key not in COUNTERS:
                found[f"{name}.{key}"] = describe_value(value, logs)
        if isinstance(owner, torch.nn.Module):
            for key, parameter in owner.named_parameters(recurse=False):
                hooks = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
                found[f"{name}.{key}"] = f"{tuple(parameter.shape)} {parameter.requires_grad} {bool(hooks)}"
    return found


def describe_value(value: Any, logs: Collection[str]) -> str:
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, dict):
        keys = sorted(key for key in map(str, value) if key.split(".")[-1] not in logs)
        return f"{type(value).__name__} of {keys}"
    if callable(value) and not isinstance(value, torch.nn.Module):
        return f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"
    return type(value).__qualname__


def fitted(method: Method | None, fails: bool) -> tuple[Trainer, LightningModule, LightningDataModule]:
    seed_everything(7, verbose=False)
    trainer = make_trainer(method.make() if method else [], enable_checkpointing=False)
    module, datamodule = (FailingDigits if fails else Digits)(), DigitsData()
    if fails:
        with pytest.raises(Boom):
            trainer.fit(module, datamodule=datamodule)
    else:
        trainer.fit(module, datamodule=datamodule)
    return trainer, module, datamodule


def check_undo(method: Method, fails: bool) -> None:
    trainer, module, datamodule = fitted(method, fails)
    plain, left = describe(*fitted(None, fails)), describe(trainer, module, datamodule, method.logs)
    changed = [
        f"{key}: {left.get(key)} instead of {plain.get(key)}"
        for key in sorted(plain.keys() | left.keys())
        if plain.get(key) != left.get(key)
    ]
    assert not changed, f"left behind: {changed}"


def check_second_fit(method: Method) -> None:
    """The same callbacks in another Trainer, with another module, do what new ones do."""
    callbacks = method.make()
    first = run(callbacks)
    assert_same_training(run(callbacks), first, "the second fit")
    with pytest.raises(Boom):
        run(callbacks, FailingDigits)
    assert_same_training(run(callbacks), first, "the fit after an exception")


def check_same_trainer(method: Method) -> None:
    """The same Trainer and module go on."""
    trainer, module, datamodule = fitted(method, fails=False)
    steps = trainer.global_step
    assert trainer.fit_loop.max_epochs is not None
    trainer.fit_loop.max_epochs += 1
    trainer.fit(module, datamodule=datamodule)
    assert trainer.current_epoch == trainer.fit_loop.max_epochs, "the second fit of the Trainer ended early"
    assert trainer.global_step > steps


@pytest.mark.parametrize("fails", [False, True], ids=["end", "exception"])
@pytest.mark.parametrize("method", cases(quick=SAMPLE))
def test_undo(method: Method, fails: bool) -> None:
    check_undo(method, fails)


@pytest.mark.parametrize("method", cases(quick=SAMPLE))
def test_second_fit(method: Method) -> None:
    check_second_fit(method)


@pytest.mark.parametrize("method", cases(quick=SAMPLE))
def test_same_trainer(method: Method) -> None:
    check_same_trainer(method)


@pytest.mark.parametrize(
    ("name", "fails"),
    [("LeavesPatch", False), ("LeavesPatchOnError", True), ("LeavesSetting", False), ("LeavesHook", False)],
)
def test_what_is_left_behind_is_flagged(name: str, fails: bool) -> None:
    with pytest.raises(AssertionError, match="left behind"):
        check_undo(wrong(name), fails)


def test_a_second_fit_that_differs_is_flagged() -> None:
    with pytest.raises(AssertionError, match="the second fit"):
        check_second_fit(wrong("OnlyOnce"))


def test_a_trainer_that_cannot_go_on_is_flagged() -> None:
    with pytest.raises(AssertionError, match="ended early"):
        check_same_trainer(wrong("StopsForGood"))
