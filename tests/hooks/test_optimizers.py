from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_accel.hooks import OptimizerTransform, parameter_names, replace_optimizers
from lightning_accel.hooks.optimizers import find_optimizers, find_schedulers
from tests.hooks.common import QUIET, At, Data, Tiny, contract, fit, loader, save_at


class Own(SGD):
    """SGD under another name: the same steps, so that a run with it can be compared with one without it."""


class Replace(OptimizerTransform):
    """Replaces each optimizer by a new one with groups made from scratch, as a careless method would."""

    contract = contract(touches=frozenset({"optimizer"}))

    def __init__(self) -> None:
        super().__init__()
        self.replaced: list[tuple[Optimizer, Optimizer]] = []

    def transform_optimizer(self, optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> Optimizer:
        kept = ("params", "lr", "momentum", "weight_decay")
        groups = [{key: group[key] for key in kept} for group in optimizer.param_groups]
        self.replaced.append((optimizer, Own(groups, lr=0.1)))
        return self.replaced[-1][1]


class InPlace(OptimizerTransform):
    contract = contract(touches=frozenset({"optimizer"}))

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def transform_optimizer(self, optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> Optimizer:
        self.names = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.param_groups[0]["weight_decay"] = 0.5
        return optimizer


def sgd(module: Tiny) -> SGD:
    return SGD(module.parameters(), lr=0.1, momentum=0.9)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: LambdaLR(o, lambda n: 1 / (n + 1)),
    "step": lambda o: StepLR(o, 2),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.5, total_steps=10),
    "cyclic": lambda o: CyclicLR(o, 0.01, 0.5, step_size_up=3),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), ExponentialLR(o, 0.8)], [3]),
    "chained": lambda o: ChainedScheduler([ConstantLR(o, 0.1, 4), ExponentialLR(o, 0.9)]),
}
SHAPES: dict[str, Callable[[Optimizer, Any], Any]] = {
    "optimizer": lambda o, s: o,
    "list": lambda o, s: [o],
    "tuple": lambda o, s: (o,),
    "two lists": lambda o, s: ([o], [s]),
    "a list and a scheduler": lambda o, s: ([o], s),
    "two lists with a dictionary": lambda o, s: [[o], [{"scheduler": s, "interval": "step", "name": "rate"}]],
    "dictionary": lambda o, s: {"optimizer": o},
    "dictionary with a scheduler": lambda o, s: {"optimizer": o, "lr_scheduler": s},
    "dictionary in a dictionary": lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step"}},
    "tuple of dictionaries": lambda o, s: ({"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step"}},),
    "list of dictionaries": lambda o, s: [{"optimizer": o, "lr_scheduler": s}],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_schedulers_in_each_shape(shape: str) -> None:
    optimizer = sgd(Tiny())
    scheduler = SCHEDULERS["sequential"](optimizer)
    expected = [scheduler, *scheduler._schedulers] if "list" in shape or "dictionar" in shape else []
    if shape in ("list", "dictionary"):
        expected = []
    assert find_schedulers(SHAPES[shape](optimizer, scheduler)) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_of_what_configure_optimizers_returns(shape: str) -> None:
    made: list[Any] = []

    def configure(module: Tiny) -> Any:
        optimizer = sgd(module)
        made.append(SHAPES[shape](optimizer, StepLR(optimizer, 1, gamma=0.5)))
        return made[-1]

    plain, module, callback = Tiny(configure), Tiny(configure), Replace()
    fit(plain, max_epochs=2)
    made.clear()
    trainer = fit(module, callback, max_epochs=2)
    [(old, new)] = callback.replaced
    assert trainer.optimizers == [new]
    assert find_optimizers(made[0]) == [old]  # the user's containers are as they were
    assert old.state == {}
    assert torch.equal(plain.layer.weight, module.layer.weight)
    for config in trainer.lr_scheduler_configs:
        assert config.scheduler.optimizer is new


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_scheduler_drives_the_new_optimizer(name: str) -> None:
    """Warnings are errors here, so that none is raised about the order of the two ``step``."""

    def configure(module: Tiny) -> Any:
        optimizer = SGD(
            [{"params": [module.layer.weight], "lr": 0.2}, {"params": [module.layer.bias]}], lr=0.1, momentum=0.9
        )
        return [optimizer], [{"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}]

    def rates(*callbacks: Any) -> tuple[list[list[float]], Tiny]:
        seen: list[list[float]] = []
        note = At(
            "on_train_batch_start",
            lambda trainer, _: seen.append([group["lr"] for group in trainer.optimizers[0].param_groups]),
        )
        module = Tiny(configure)
        fit(module, *callbacks, note, max_epochs=2)
        return seen, module

    expected, plain = rates()
    actual, module = rates(Replace())
    assert actual == expected
    assert len({tuple(row) for row in expected}) > 1
    assert torch.equal(plain.layer.weight, module.layer.weight)


def test_reduce_on_plateau() -> None:
    def configure(module: Tiny) -> Any:
        optimizer = sgd(module)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=100.0)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "loss"}

    class Module(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    plain, trainer = fit(Module(configure), max_epochs=3), fit(Module(configure), Replace(), max_epochs=3)
    assert isinstance(trainer.optimizers[0], Own)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == plain.optimizers[0].param_groups[0]["lr"] < 0.1


def test_a_scheduler_that_is_stepped_first_still_warns() -> None:
    def configure(module: Tiny) -> Any:
        optimizer = sgd(module)
        return [optimizer], [StepLR(optimizer, 1)]

    def early(trainer: Any, module: Any) -> None:
        with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
            trainer.lr_scheduler_configs[0].scheduler.step()

    fit(Tiny(configure), Replace(), At("on_train_start", early))


def test_initial_lr_and_what_a_scheduler_keeps_in_the_groups_is_carried_to_groups_in_another_order() -> None:
    class Regroup(Replace):
        def transform_optimizer(self, optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> Optimizer:
            groups = [{"params": group["params"], "lr": group["lr"]} for group in reversed(optimizer.param_groups)]
            return Own(groups, lr=0.1)

    def configure(module: Tiny) -> Any:
        optimizer = SGD([{"params": [module.layer.weight], "lr": 0.2}, {"params": [module.layer.bias]}], lr=0.1)
        return [optimizer], [{"scheduler": CyclicLR(optimizer, [0.1, 0.3], [1.0, 2.0]), "interval": "step"}]

    seen: list[Any] = []
    note = At("on_train_start", lambda trainer, _: seen.extend(trainer.optimizers[0].param_groups))
    fit(Tiny(configure), Regroup(), note)
    assert [group["initial_lr"] for group in seen] == [0.3, 0.1]


def test_in_place() -> None:
    optimizers: list[Optimizer] = []

    def configure(module: Tiny) -> Any:
        optimizers.append(sgd(module))
        return [optimizers[-1]], [StepLR(optimizers[-1], 1)]

    callback = InPlace()
    trainer = fit(Tiny(configure), callback)
    assert trainer.optimizers == optimizers
    assert optimizers[0].param_groups[0]["weight_decay"] == 0.5
    assert callback.names == ["layer.weight", "layer.bias"]


def test_two_transforms_act_in_turn() -> None:
    first, second = Replace(), InPlace()
    trainer = fit(Tiny(sgd), first, second)
    assert trainer.optimizers == [first.replaced[0][1]]
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.5


def test_several_optimizers_under_manual_optimization() -> None:
    class Manual(Tiny):
        def __init__(self) -> None:
            super().__init__(self.both)
            self.automatic_optimization = False
            self.other = nn.Linear(4, 1)

        def both(self, _: Tiny) -> Any:
            a, b = SGD(self.layer.parameters(), lr=0.1), SGD(self.other.parameters(), lr=0.2)
            return [a, b], [StepLR(a, 1), StepLR(b, 1)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, layer in zip(self.optimizers(), (self.layer, self.other), strict=True):  # type: ignore[arg-type]
                loss = ((layer(batch[0]) - batch[1]) ** 2).mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
                scheduler.step()

    torch.manual_seed(0)
    plain = Manual()
    module, callback = copy.deepcopy(plain), Replace()
    module.configure = module.both
    fit(plain, data=loader(2))
    trainer = fit(module, callback, data=loader(2))
    assert trainer.optimizers == [new for _, new in callback.replaced]
    assert len(trainer.optimizers) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))


def test_no_optimizer_at_all() -> None:
    callback = Replace()
    with pytest.warns(UserWarning, match="will run with no optimizer"):
        fit(Tiny(lambda module: None), callback)
    assert callback.replaced == []


class ForCli(Tiny):
    def __init__(self) -> None:
        super().__init__()


@pytest.mark.filterwarnings("ignore:.* will be overridden by `LightningCLI.configure_optimizers`")
def test_the_optimizer_of_lightning_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = Replace()
    monkeypatch.setattr(sys, "argv", ["prog"])
    cli = LightningCLI(
        ForCli,
        Data,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults=QUIET | {"callbacks": [callback], "max_epochs": 1},
        args=[
            "fit",
            *("--optimizer=torch.optim.SGD", "--optimizer.lr=0.05", "--optimizer.momentum=0.9"),
            *("--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"),
        ],
    )
    [(old, new)] = callback.replaced
    assert cli.trainer.optimizers == [new]
    assert old.param_groups[0]["momentum"] == 0.9
    assert new.param_groups[0]["lr"] == 0.025
    assert "Patched" not in type(cli.model.configure_optimizers).__name__


def test_the_state_of_a_checkpoint_is_restored_into_the_new_optimizer(tmp_path: Any) -> None:
    def configure(module: Tiny) -> Any:
        optimizer = sgd(module)
        return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]

    path, whole, resumed = tmp_path / "a.ckpt", Tiny(configure), Tiny(configure)
    fit(whole, Replace(), save_at("on_train_epoch_end", path, on=0), max_epochs=2)
    trainer = fit(resumed, Replace(), max_epochs=2, ckpt_path=path)
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025


def test_replace_optimizers_on_its_own() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    old, other, new = SGD([parameter], lr=0.1), Adam([parameter]), AdamW([parameter])
    given = {"a": [old, (other, {"b": LightningOptimizer(old)})], "c": "text", "d": None}
    assert replace_optimizers(given, {id(old): new}) == {"a": [new, (other, {"b": new})], "c": "text", "d": None}
    assert given["a"][0] is old  # type: ignore[index]
    assert find_optimizers(given) == [old, other]
    assert replace_optimizers(other, {id(old): new}) is other


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # by torch, of its own nesting
def test_schedulers_inside_schedulers() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    old, new = SGD([parameter], lr=0.1), SGD([parameter], lr=0.1)
    inner = [ConstantLR(old, 0.1, 4), ExponentialLR(old, 0.9)]
    outer = SequentialLR(old, [ChainedScheduler(inner), StepLR(old, 1)], [5])
    replace_optimizers({"optimizer": old, "lr_scheduler": {"scheduler": outer}}, {id(old): new})
    for scheduler in [outer, *outer._schedulers, *inner]:
        assert scheduler.optimizer is new


def test_the_closure_goes_through_a_counted_step() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    old, new = SGD([parameter], lr=0.1), SGD([parameter], lr=0.1)
    scheduler = StepLR(old, 1)
    replace_optimizers([old, scheduler], {id(old): new})
    assert new.step(lambda: 3.0) == 3.0
    scheduler.step()  # without a warning
    replace_optimizers([new, StepLR(new, 1)], {id(new): old})
    assert scheduler.optimizer is new


def test_parameter_names_of_shared_and_compiled_modules() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)
            self.b.weight = self.a.weight

    module = Module()
    names = parameter_names(module)
    assert list(names.values()) == ["a.weight", "a.bias", "b.bias"]
    assert names[module.b.weight] == "a.weight"
    module.a = torch.compile(module.a)  # type: ignore[assignment]
    assert list(parameter_names(module).values()) == ["a.weight", "a.bias", "b.bias"]
