from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR, SequentialLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_accel import (
    EMA,
    FusedOptimizer,
    GradualPruning,
    LearningRateFinder,
    LowBitOptimizer,
    Muon,
    OptimizerInBackward,
    ScheduleFree,
)
from lightning_accel.optimizers.schedule_free_steps import to_average_, to_training_, use_schedule_free_
from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy
from tests.conformance.compare import assert_equal
from tests.conformance.toy import Digits, ManualDigits, make_trainer, run, train_loader, val_loader
from tests.conftest import WEIGHTS_ONLY
from tests.optimizers.toy import model, train, weights

Weights = dict[str, Tensor]
OURS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3, eps=1e-6),
    "AdamW, one by one": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=False),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8, weight_decay=1e-3, nesterov=True),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.5),
}
THEIRS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda p: schedulefree.AdamWScheduleFree(
        p, lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1, warmup_steps=5, r=0.5
    ),
    "Adam": lambda p: schedulefree.AdamWScheduleFree(p, lr=3e-3, eps=1e-6, warmup_steps=5, r=0.5),
    "AdamW, one by one": lambda p: schedulefree.AdamWScheduleFree(
        p, lr=3e-3, weight_decay=0.01, warmup_steps=5, r=0.5, foreach=False
    ),
    "RAdam": lambda p: schedulefree.RAdamScheduleFree(p, lr=1e-2, weight_decay=0.1, r=0.5),
    "SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=0.5, momentum=0.8, weight_decay=1e-3, warmup_steps=5, r=0.5),
    "SGD without momentum": lambda p: schedulefree.SGDScheduleFree(p, lr=0.5, warmup_steps=5, r=0.5),
}


def copied(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """One of them has options of its own."""
    first, *rest = module.parameters()
    return [{"params": [first], "lr": 1e-3, "weight_decay": 0.0, "name": "first"}, {"params": rest}]


# --------------------------------------------------------------------------------------------------- the functions


@pytest.mark.parametrize("name", OURS)
def test_bit_for_bit_the_package_driven_by_hand(name: str) -> None:
    ours, theirs = model(), model()
    optimizer = OURS[name](groups(ours))
    warm = {} if name == "RAdam" else {"warmup_steps": 5}
    assert use_schedule_free_(optimizer, r=0.5, **warm) is optimizer
    package = THEIRS[name](groups(theirs))
    package.train()
    assert type(optimizer) is type(package)
    for group, expected in zip(optimizer.param_groups, package.param_groups, strict=True):
        assert {**group, "params": None} == {**expected, "params": None}
    assert train(ours, optimizer, 12) == train(theirs, package, 12)
    assert_equal(weights(ours), weights(theirs), "what is trained")
    to_average_(optimizer)
    package.eval()
    assert_equal(weights(ours), weights(theirs), "the average")
    assert not torch.equal(weights(ours), weights(model()))


def test_coming_back_from_the_average_is_exact_where_the_package_is_not() -> None:
    module = model()
    optimizer = use_schedule_free_(torch.optim.AdamW(module.parameters()))
    train(module, optimizer, 5)
    theirs, before = copy.deepcopy((module, optimizer)), weights(module)
    for _ in range(2):  # the second time does nothing
        to_average_(optimizer)
    assert not torch.equal(weights(module), before)
    for _ in range(2):
        to_training_(optimizer)
    assert_equal(weights(module), before, "what is trained")
    assert set(optimizer.state[next(module.parameters())]) == {"z", "exp_avg_sq"}
    twin, package = theirs
    package.eval()  # type: ignore[attr-defined]
    package.train()  # type: ignore[attr-defined]
    assert not torch.equal(weights(twin), before)


def test_a_state_is_loaded_bit_for_bit_also_one_of_the_average() -> None:
    whole, resumed = model(), model(1)
    first, second = (use_schedule_free_(torch.optim.AdamW(m.parameters(), lr=3e-3)) for m in (whole, resumed))
    train(whole, first, 3)
    to_average_(first)
    resumed.load_state_dict(copied(whole))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    to_training_(first)
    to_training_(second)
    assert train(whole, first, 3, start=3) == train(resumed, second, 3, start=3)
    assert_equal(weights(resumed), weights(whole), "what is trained")


def test_a_state_that_the_package_saved_in_evaluation_goes_on_as_there() -> None:
    theirs, ours = model(), model(1)
    package = schedulefree.AdamWScheduleFree(theirs.parameters(), lr=3e-3)
    package.train()
    train(theirs, package, 3)
    package.eval()
    optimizer = use_schedule_free_(torch.optim.AdamW(ours.parameters(), lr=3e-3))
    ours.load_state_dict(copied(theirs))
    optimizer.load_state_dict(copy.deepcopy(package.state_dict()))
    to_training_(optimizer)
    package.train()
    assert train(theirs, package, 3, start=3) == train(ours, optimizer, 3, start=3)


def test_what_is_saved_at_the_average_goes_on_in_the_package() -> None:
    ours, theirs = model(), model(1)
    optimizer = use_schedule_free_(torch.optim.AdamW(ours.parameters(), lr=3e-3))
    train(ours, optimizer, 3)
    to_average_(optimizer)
    theirs.load_state_dict(copied(ours))
    package = schedulefree.AdamWScheduleFree(theirs.parameters())
    package.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    package.train()
    to_training_(optimizer)
    torch.testing.assert_close(weights(theirs), weights(ours))  # but for the last bits
    assert train(theirs, package, 2, start=3) == pytest.approx(train(ours, optimizer, 2, start=3), abs=1e-5)


def test_parameters_without_steps_and_groups_added_later() -> None:
    module, late = model(), nn.Parameter(torch.ones(3))
    optimizer = use_schedule_free_(torch.optim.SGD(module.parameters(), lr=0.1))
    train(module, optimizer, 2)
    optimizer.add_param_group({"params": [late]})
    train(module, optimizer, 1)
    assert late not in optimizer.state
    late.grad = torch.ones(3)
    for _ in range(2):
        optimizer.step()
    before = late.detach().clone()
    to_average_(optimizer)
    assert not torch.equal(late.detach(), before)
    to_training_(optimizer)
    assert_equal(late.detach(), before, "what is trained")


def test_a_fused_step_leaves_nothing_behind() -> None:
    """Its flag tells a GradScaler that the step unscales gradients by itself."""
    module = model()
    optimizer = use_schedule_free_(torch.optim.AdamW(module.parameters(), fused=True))
    plain = model()
    other = use_schedule_free_(torch.optim.AdamW(plain.parameters()))
    for scaler, net, steps in (
        (torch.amp.GradScaler("cpu", init_scale=1024.0), module, optimizer),
        (torch.amp.GradScaler("cpu", enabled=False), plain, other),
    ):
        scaler.scale(net(torch.ones(4, 64)).square().mean()).backward()
        scaler.step(steps)
    assert_equal(weights(module), weights(plain), "weights")


LEAVE_OUT: list[tuple[Callable[[Any], Optimizer], dict[str, Any], str]] = [
    (lambda p: torch.optim.LBFGS(p), {}, "LBFGS has none: use AdamW, Adam, RAdam or SGD"),
    (lambda p: type("Own", (torch.optim.AdamW,), {})(p), {}, "Own has none"),
    (lambda p: torch.optim.AdamW(p, amsgrad=True), {}, "that of AdamW has no `amsgrad`: leave it out"),
    (lambda p: torch.optim.SGD(p, maximize=True), {}, "has no `maximize`"),
    (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.1), {}, "has no `dampening`"),
    (lambda p: torch.optim.Adam(p, weight_decay=0.1), {}, "use AdamW, or weight_decay=0"),
    (lambda p: torch.optim.RAdam(p, weight_decay=0.1), {}, "use decoupled_weight_decay=True, or weight_decay=0"),
    (lambda p: torch.optim.RAdam(p), {"warmup_steps": 3}, "leave `warmup_steps` at 0"),
]


@pytest.mark.parametrize(("make", "options", "message"), LEAVE_OUT)
def test_what_has_no_schedule_free_form_is_refused(
    make: Callable[[Any], Optimizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"a schedule-free counterpart, but .*{message}"):
        use_schedule_free_(make(model().parameters()), **options)


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, 1)
    with pytest.raises(ValueError, match="has made steps already"):
        use_schedule_free_(optimizer)


@pytest.mark.parametrize("name", ["AdamW", "RAdam", "SGD"])
def test_the_state_of_an_optimizer_with_a_schedule_is_converted(name: str) -> None:
    plain, ours, said = model(), model(1), []
    old = OURS[name](plain.parameters())
    train(plain, old, 4)
    ours.load_state_dict(copied(plain))
    optimizer = use_schedule_free_(OURS[name](ours.parameters()), warn=said.append)
    rate = optimizer.param_groups[0]["lr"]
    for group in old.param_groups:
        group["lr"] = 1e-9  # where a schedule had come to
    optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
    (group,) = optimizer.param_groups
    assert group["lr"] == rate and group["train_mode"]
    assert len(said) == 1 and "the average begins at the checkpoint's weights" in said[0]
    to_average_(optimizer)
    assert_equal(weights(ours), weights(plain), "the average")
    to_training_(optimizer)
    first, theirs = next(ours.parameters()), next(plain.parameters())
    if name == "SGD":
        assert "nothing of it is used" in said[0] and group["k"] == 0
    else:
        assert "its second moments and count of steps go on" in said[0] and group["k"] == 4
        assert_equal(optimizer.state[first]["exp_avg_sq"], old.state[theirs]["exp_avg_sq"], "second moments")
    losses = train(ours, optimizer, 20, start=4)
    assert losses[-1] < losses[0]
    to_average_(optimizer)
    assert not torch.equal(weights(ours), weights(plain))


def test_groups_that_do_not_fit_are_refused_by_torch() -> None:
    first, second = model(), model()
    optimizer = use_schedule_free_(torch.optim.SGD(first.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(torch.optim.SGD(groups(second), lr=0.1).state_dict())


# ---------------------------------------------------------------------------------------------------- the callback


class Watch(Callback):
    """Keeps the weights after each batch, and those that each validation is run with."""

    def __init__(self) -> None:
        self.trained: list[Weights] = []
        self.validated: list[Weights] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.trained.append(copied(pl_module))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            self.validated.append(copied(pl_module))


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        (group,) = optimizer.param_groups
        self.seen.append((group["lr"], group["betas"][0] if "betas" in group else group["momentum"]))


class Plain(Digits):
    """Without schedule, dropout and batch norm."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"regular": False, "scheduler": None, "torchmetric": False, **options})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.step(batch))


def fitted(
    callbacks: Sequence[Callback], module: LightningModule | None = None, **arguments: Any
) -> tuple[Any, Trainer, Watch]:
    torch.manual_seed(0)
    module, watch = module or Plain(), Watch()
    arguments = {"max_epochs": 1, "enable_checkpointing": False, **arguments}
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer = make_trainer([*callbacks, watch], **arguments)
    trainer.fit(module, train_loader(shuffle=False), val_loader(), ckpt_path=ckpt_path)
    return module, trainer, watch


def test_a_fit_is_the_package_driven_by_hand() -> None:
    free = ScheduleFree(warmup_steps=4)
    module, _, watch = fitted([free])
    torch.manual_seed(0)
    twin = Plain()
    package = schedulefree.AdamWScheduleFree(twin.parameters(), lr=3e-3, weight_decay=0.05, warmup_steps=4)
    package.train()
    averages = []
    for (x, y), trained in zip(train_loader(shuffle=False), watch.trained, strict=True):
        package.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        package.step()
        assert_equal(copied(twin), trained, "what is trained")
        average, evaluated = copy.deepcopy((twin, package))
        evaluated.eval()
        averages.append(copied(average))
    assert_equal(watch.validated, averages[2::3], "what is validated")
    assert_equal(copied(module), averages[-1], "what is left")
    assert free.choices == ["AdamWScheduleFree in the place of AdamW: learning rate 0.003, momentum 0.9"]


def test_validation_changes_nothing() -> None:
    validated, unvalidated = fitted([ScheduleFree()]), fitted([ScheduleFree()], limit_val_batches=0)
    assert validated[2].validated and not unvalidated[2].validated
    assert_equal(validated[2].trained, unvalidated[2].trained, "what is trained")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the fresh Trainer saves nothing
def test_the_weights_of_a_checkpoint_are_the_average(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    module, trainer, watch = fitted([ScheduleFree(), saver], enable_checkpointing=True)
    step = torch.load(saver.best_model_path, weights_only=True)["global_step"]
    loaded = Plain.load_from_checkpoint(saver.best_model_path, map_location="cpu", **WEIGHTS_ONLY)
    assert_equal(copied(loaded), watch.validated[step // 3 - 1], "the weights")
    left = copied(module)
    (tested,) = trainer.test(module, val_loader(), ckpt_path="best", verbose=False)
    assert tested["test_loss"] == pytest.approx(float(saver.best_model_score), rel=1e-6)
    assert_equal(copied(module), copied(loaded), "the weights after the test")
    trainer.validate(module, val_loader(), verbose=False)
    assert_equal(copied(module), copied(loaded), "the weights after validation")
    assert step == 9 or not torch.equal(left["head.weight"], copied(loaded)["head.weight"])


def test_a_checkpoint_of_weights_only(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True)
    module, _, _ = fitted([ScheduleFree(), saver], enable_checkpointing=True)
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert_equal(dict(saved["state_dict"]), copied(module), "the weights")


class Saves(Callback):
    """Saves in validation, or after a batch, or at an exception; and looks that this changes nothing."""

    def __init__(self, path: Path, hook: str) -> None:
        self.path, self.hook = path, hook

    def save(self, trainer: Trainer, pl_module: LightningModule, hook: str) -> None:
        if hook == self.hook and not trainer.sanity_checking:
            before = copied(pl_module)
            trainer.save_checkpoint(self.path)
            assert_equal(copied(pl_module), before, "the weights after saving")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.save(trainer, pl_module, "validation")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.save(trainer, pl_module, "batch")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.save(trainer, pl_module, "exception")


@pytest.mark.parametrize("hook", ["validation", "batch"])
def test_a_checkpoint_has_the_average_wherever_it_is_saved(tmp_path: Path, hook: str) -> None:
    _, _, watch = fitted([Saves(tmp_path / "saved.ckpt", hook), ScheduleFree()], limit_train_batches=3)
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert_equal(dict(saved["state_dict"]), watch.validated[-1], "the weights")
    (state,) = saved["optimizer_states"]
    assert not state["param_groups"][0]["train_mode"]  # as the package wants it
    assert_equal(state["state"][0]["y"], watch.trained[-1]["conv.weight"], "what is trained")


def test_a_checkpoint_that_is_saved_after_the_fit_goes_on_exactly(tmp_path: Path) -> None:
    _, _, whole = fitted([ScheduleFree()], max_epochs=2)
    _, trainer, _ = fitted([ScheduleFree()])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    _, _, resumed = fitted([ScheduleFree()], Plain(), max_epochs=2, ckpt_path=tmp_path / "after.ckpt")
    assert_equal(resumed.trained, whole.trained[9:], "what is trained")
    assert_equal(resumed.validated, whole.validated[3:], "what is validated")


class Fails(Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.hook == "validation" and not trainer.sanity_checking:
            raise RuntimeError("out of coffee")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.hook == "batch" and trainer.global_step == 3:
            raise RuntimeError("out of coffee")


@pytest.mark.parametrize("hook", ["validation", "batch"])
def test_an_exception_leaves_the_average_too(tmp_path: Path, hook: str) -> None:
    _, _, whole = fitted([ScheduleFree()])
    module = Plain()
    torch.manual_seed(0)
    module = Plain()
    saved = tmp_path / "saved.ckpt"
    trainer = make_trainer([ScheduleFree(), Saves(saved, "exception"), Fails(hook)], enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="coffee"):
        trainer.fit(module, train_loader(shuffle=False), val_loader())
    assert_equal(copied(module), whole.validated[0], "the weights")
    loaded = torch.load(saved, weights_only=True)
    assert_equal(dict(loaded["state_dict"]), whole.validated[0], "the weights in the checkpoint")
    assert_equal(loaded["optimizer_states"][0]["state"][0]["y"], whole.trained[2]["conv.weight"], "what is trained")


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.02, total_steps=20),
    "CyclicLR, later": lambda o: SequentialLR(
        o, [LambdaLR(o, lambda step: 0.5), CyclicLR(o, 1e-3, 0.02, step_size_up=2)], milestones=[2]
    ),
}


class Scheduled(Plain):
    def __init__(self, name: str = "OneCycleLR", optimizer: str = "adamw") -> None:
        super().__init__(optimizer=optimizer)
        self.name = name

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": SCHEDULERS[self.name](optimizer), "interval": "step"}]


def test_schedulers_are_refused_unless_something_is_said() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"with OneCycleLR: .*Leave the scheduler out .*'remove'.*'keep'"
    ):
        fitted([ScheduleFree()], Scheduled())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_schedulers_are_removed_with_all_that_they_changed(optimizer: str) -> None:
    free = ScheduleFree(schedulers="remove")
    _, trainer, _ = fitted([free], Scheduled(optimizer=optimizer))
    assert not trainer.lr_scheduler_configs
    (group,) = trainer.optimizers[0].param_groups
    assert group["lr"] == group["scheduled_lr"] == 0.02
    assert not {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"} & set(group)
    assert free.choices[0].endswith("learning rate 0.02, momentum 0.9; OneCycleLR is removed")


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_schedulers_that_are_kept_change_the_rate_and_not_the_momentum(name: str, optimizer: str) -> None:
    rates = Rates()
    fitted([ScheduleFree(schedulers="keep"), rates], Scheduled(name, optimizer))
    assert len({rate for rate, _ in rates.seen}) > 2
    assert {momentum for _, momentum in rates.seen} == {0.9}


def test_a_momentum_of_ones_own() -> None:
    _, trainer, _ = fitted([ScheduleFree(momentum=0.95, r=1.0, weight_lr_power=1.0)])
    (group,) = trainer.optimizers[0].param_groups
    assert group["betas"] == (0.95, 0.999) and group["r"] == 1.0 and group["weight_lr_power"] == 1.0


def test_removing_under_manual_optimization_is_refused() -> None:
    class Manual(ManualDigits):
        def configure_optimizers(self) -> Any:
            optimizers = super().configure_optimizers()
            return list(optimizers), [SCHEDULERS["OneCycleLR"](optimizers[0])]

    with pytest.raises(MisconfigurationException, match="the module steps OneCycleLR by itself: leave it out"):
        fitted([ScheduleFree(schedulers="remove")], Manual())


class Sparse(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 3, sparse=True)


class Quasi(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("callbacks", "module", "message"),
    [
        ([EMA()], Plain, "EMA: the weights that are evaluated are an average already"),
        ([StochasticWeightAveraging(0.1)], Plain, "StochasticWeightAveraging: the weights that are evaluated"),
        ([Muon()], Plain, "Muon: a momentum that is orthogonalised"),
        ([FusedOptimizer()], Plain, "FusedOptimizer: schedule-free optimizers have no fused step"),
        ([], Sparse, "sparse gradients, which AdamW gets here: make the embeddings with sparse=False"),
        ([], Quasi, "LBFGS: .*use AdamW, Adam, RAdam or SGD"),
    ],
)
def test_what_it_can_not_work_with(callbacks: list[Callback], module: Callable[[], Plain], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"ScheduleFree can't work with .*{message}"):
        fitted([ScheduleFree(), *callbacks], module())


def test_an_optimizer_that_is_split_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="ZeroRedundancyStrategy: a rank has the state of some weights"):
        fitted([ScheduleFree()], strategy=ZeroRedundancyStrategy())


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "schedulefree", None)
    with pytest.raises(ImportError, match=r"lightning-accel\[schedulefree\]"):
        fitted([ScheduleFree()])


@pytest.mark.parametrize("schedulers", ["remove", "keep"])
def test_a_run_with_a_schedule_goes_on_without_one(tmp_path: Path, schedulers: Any) -> None:
    whole, rates, path = Rates(), Rates(), tmp_path / "plain.ckpt"
    fitted([whole], Scheduled(), max_epochs=2)
    _, trainer, _ = fitted([], Scheduled())
    trainer.save_checkpoint(path)
    with pytest.warns(UserWarning, match=r"The checkpoint's optimizer was not schedule-free: .*count of steps go on"):
        callbacks = [ScheduleFree(schedulers=schedulers), rates]
        _, trainer, watch = fitted(callbacks, Scheduled(), max_epochs=2, ckpt_path=path)
    (group,) = trainer.optimizers[0].param_groups
    assert group["k"] == 18 and len(watch.trained) == 9
    kept = [rate for rate, _ in whole.seen[9:]]
    assert rates.seen == [(rate, 0.9) for rate in (kept if schedulers == "keep" else [0.02] * 9)]


def test_the_way_back_is_refused_where_it_can_be(tmp_path: Path) -> None:
    for name in ("adamw", "sgd"):
        path = tmp_path / f"{name}.ckpt"
        _, trainer, _ = fitted([ScheduleFree()], Plain(optimizer=name))
        trainer.save_checkpoint(path)
        with pytest.raises(MisconfigurationException, match="or begin a fit with the weights of the checkpoint"):
            fitted([ScheduleFree(enabled=False)], Plain(optimizer=name), max_epochs=2, ckpt_path=path)
        with pytest.raises(KeyError, match=r"step|dampening"):  # as the page says
            fitted([], Plain(optimizer=name), max_epochs=2, ckpt_path=path)


class Thaws(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.conv.requires_grad_(batch_idx >= 4)


def test_a_layer_that_is_frozen_at_first() -> None:
    class Frozen(Plain):
        def configure_optimizers(self) -> Any:
            return self.configured(self.parameters())

    module = Frozen()
    module.conv.requires_grad_(False)
    before = copied(module)["conv.weight"]
    module, _, watch = fitted([Thaws(), ScheduleFree()], module)
    assert_equal(watch.validated[0]["conv.weight"], before, "frozen")
    assert not torch.equal(watch.validated[-1]["conv.weight"], before)
    assert_equal(copied(module), watch.validated[-1], "what is left")


def test_pruned_weights_are_zero_in_the_average() -> None:
    pruning = GradualPruning(amount=0.8, start=0, end="1fit", every="1step")
    module, _, watch = fitted([ScheduleFree(), pruning])
    assert (watch.trained[-1]["hidden.weight"] == 0).float().mean() > 0.5
    for seen in (copied(module), watch.validated[-1]):
        assert (seen["hidden.weight"][watch.trained[-2]["hidden.weight"] == 0] == 0).all()


def test_pruned_weights_are_zero_where_a_hook_of_the_module_changes_gradients() -> None:
    class Noisy(Plain):
        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.add_(0.1)

    module, _, watch = fitted([ScheduleFree(), GradualPruning(amount=0.8, start=0, end=2, every="1step")], Noisy())
    pruned = watch.trained[-1]["hidden.weight"] == 0
    assert pruned.float().mean() > 0.5
    assert (copied(module)["hidden.weight"][pruned] == 0).all()


def test_low_bit_second_moments() -> None:
    low_bit = LowBitOptimizer(min_size=512)
    module, trainer, _ = fitted([low_bit, ScheduleFree()])
    state = trainer.optimizers[0].state[module.hidden.weight]
    assert state["exp_avg_sq"]["codes"].dtype == torch.uint8
    assert state["z"].dtype == state["y"].dtype == torch.float32
    plain = fitted([ScheduleFree()])[0]
    assert not torch.equal(module.hidden.weight, plain.hidden.weight)
    torch.testing.assert_close(module.hidden.weight, plain.hidden.weight, atol=0.02, rtol=0)


@pytest.mark.parametrize("others", [list, lambda: [LowBitOptimizer(min_size=512)]], ids=["alone", "in few bits"])
def test_steps_in_the_backward_pass_are_the_same(others: Callable[[], list[Callback]]) -> None:
    together, alone = (
        fitted([ScheduleFree(warmup_steps=3), *others(), *more]) for more in ([], [OptimizerInBackward()])
    )
    assert_equal(alone[2].trained, together[2].trained, "what is trained")
    assert_equal(alone[2].validated, together[2].validated, "what is validated")


def test_a_rate_is_found_and_trained_with() -> None:
    finder = LearningRateFinder(min_lr=1e-4, max_lr=0.5, num_steps=20)
    _, trainer, watch = fitted([finder, ScheduleFree()])
    (group,) = trainer.optimizers[0].param_groups
    assert group["lr"] == group["lr_max"] != 3e-3 and group["k"] == 9
    assert len(watch.trained) == 9


# ------------------------------------------------------------------------------------------------------ batch norm


def test_batch_norm_is_spoken_of() -> None:
    with pytest.warns(UserWarning, match="statistics of 1 layers of batch norm .* Set `batch_norm_batches`"):
        fitted([ScheduleFree()], Plain(regular=True))
    fitted([ScheduleFree(batch_norm_batches=0)], Plain(regular=True))


def by_hand(module: Digits, values: Weights, batches: int) -> Weights:
    module.load_state_dict(values)
    module.norm.reset_running_stats()  # type: ignore[operator]
    module.norm.momentum = None  # type: ignore[assignment]
    module.train()
    with torch.no_grad():
        for (x, _), _ in zip(train_loader(shuffle=False), range(batches), strict=False):
            module(x)
    return copied(module)


def test_the_statistics_of_batch_norm_are_those_of_the_average() -> None:
    free = ScheduleFree(batch_norm_batches=3)
    module, _, watch = fitted([free], Plain(regular=True))
    for seen in (watch.validated[1], watch.validated[-1], copied(module)):
        assert_equal(seen, by_hand(Plain(regular=True), seen, 3), "the statistics")


class Counts(Plain):
    """Has a metric of the training, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__(regular=True)
        self.trained = MulticlassAccuracy(10)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained(self(batch[0]), batch[1])
        self.log("trained", self.trained, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_finding_the_statistics_changes_nothing_else() -> None:
    """Data order, dropout, metrics, buffers of the training."""
    left, found = (run([ScheduleFree(batch_norm_batches=n)], Counts) for n in (0, 3))
    assert_equal(left.trace, found.trace, "losses")
    metrics = [{key: run.trainer.callback_metrics[key] for key in ("trained", "loss")} for run in (left, found)]
    assert_equal(metrics[0], metrics[1], "metrics of the training")
    (a,), (b,) = left.final["optimizer_states"], found.final["optimizer_states"]
    assert_equal(a, b, "the optimizer")
    statistics = found.final["callbacks"][ScheduleFree(batch_norm_batches=3).state_key]["statistics"]
    for name, value in statistics.items():
        assert_equal(value, left.weights[name], "the statistics of the training")
        assert not torch.equal(value, found.weights[name])


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_a_layer_of_batch_norm_that_is_kept_in_evaluation_keeps_its_statistics() -> None:
    class Held(Plain):
        def on_train_epoch_start(self) -> None:
            self.norm.eval()

    module = Held(regular=True)
    module.norm.eval()
    before = copied(module)
    module, _, watch = fitted([ScheduleFree(batch_norm_batches=2)], module)
    for seen in (watch.validated[-1], copied(module)):
        assert_equal(seen["norm.running_mean"], before["norm.running_mean"], "the statistics")


def test_batch_norm_under_compile_by_another_name() -> None:
    from lightning_accel.optimizers.batch_norm import swap_buffers_

    module = nn.ModuleDict({"net": nn.BatchNorm1d(2)})
    wrapped = nn.ModuleDict({"net": torch.compile(module["net"], backend="eager")})
    before = swap_buffers_(wrapped, {"net.running_mean": torch.ones(2)})
    assert_equal(before, {"net.running_mean": torch.zeros(2)}, "before")
    swap_buffers_(module, {"net._orig_mod.running_mean": torch.full((2,), 2.0)})
    assert_equal(module["net"].running_mean, torch.full((2,), 2.0), "after")
