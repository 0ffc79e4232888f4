from __future__ import annotations

import io
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from lightning_accel import GradientAccumulation
from lightning_accel.hooks import TOUCHABLE, AccelCallback, Contract, Plan, check_conflicts, derive_order
from tests.hooks.common import At, Tiny, callback_class, contract, fit, loader, make_trainer


def named(name: str, *touches: str, **changes: Any) -> AccelCallback:
    made: AccelCallback = callback_class(name, touches=frozenset(touches), **changes)()
    return made


def order(*callbacks: AccelCallback) -> list[str]:
    return [type(callback).__name__ for callback in derive_order(callbacks)]


def test_order_is_that_of_what_is_touched_first() -> None:
    callbacks = [named(name.replace(" ", "_"), name) for name in reversed(TOUCHABLE)]
    assert order(*callbacks) == [name.replace(" ", "_") for name in TOUCHABLE]


def test_the_first_of_several_touched_counts_and_nothing_touched_is_last() -> None:
    assert order(named("Reader"), named("A", "input"), named("B", "gradients", "optimizer")) == ["B", "A", "Reader"]


def test_ties_keep_the_order_of_the_user() -> None:
    assert order(named("B", "input"), named("A", "input"), named("C", "input")) == ["B", "A", "C"]


def test_after_goes_before_the_touch_order_and_counts_base_classes() -> None:
    base = callback_class("Base", touches=frozenset({"gradients"}))
    derived = type("Derived", (base,), {})
    early = named("Early", "input", after=frozenset({"Base"}))
    assert order(early, derived()) == ["Derived", "Early"]
    assert order(early) == ["Early"]


def test_a_chain_of_after() -> None:
    a, b = named("A", "input", after=frozenset({"B"})), named("B", "input", after=frozenset({"C"}))
    assert order(a, b, named("C", "input")) == ["C", "B", "A"]


def test_a_cycle_of_after() -> None:
    with pytest.raises(RuntimeError, match="each want to come after another"):
        derive_order([named("A", "input", after=frozenset({"B"})), named("B", "input", after=frozenset({"A"}))])


def test_a_contract_of_something_that_can_not_be_touched() -> None:
    with pytest.raises(ValueError, match=r"Expected `touches` and `reads` to be of .*, but got \['wieghts'\]\."):
        contract(touches=frozenset({"wieghts"}))
    with pytest.raises(ValueError, match="'lose'"):
        contract(reads=frozenset({"lose"}))


class Once(AccelCallback):
    contract = contract(once=True)


class OnceDerived(Once):
    pass


@pytest.mark.parametrize("second", [Once, OnceDerived])
def test_once(second: type[Once]) -> None:
    with pytest.raises(MisconfigurationException, match=r"Once is in the Trainer's callbacks twice: remove one\."):
        fit(Tiny(), Once(), second(**({} if second is OnceDerived else {"a": 1})))


def test_once_alone_works() -> None:
    fit(Tiny(), Once())


@pytest.mark.parametrize("refused", ["SingleDeviceStrategy", "Strategy", "ModelSummary", "Other", "AccelCallback"])
def test_refused_strategies_and_callbacks_by_the_name_of_a_class_or_of_its_base(refused: str) -> None:
    picky = named("Picky", refuses={refused: "they differ. Do something else."})
    other = callback_class("Other")()
    trainer = make_trainer(picky, other, ModelSummary())
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    with pytest.raises(MisconfigurationException, match=r"Picky can't work with \w+: they differ. Do something else\."):
        trainer.fit(Tiny(), loader())


def test_what_is_not_refused() -> None:
    trainer = make_trainer()
    # its own class, a class that is not there, and other parts of a name
    names = ("Picky", "DDPStrategy", "Single", "singledevicestrategy")
    picky = named("Picky", refuses=dict.fromkeys(names, "no."))
    trainer.callbacks.append(picky)
    check_conflicts([picky], trainer, Tiny())


def test_a_strategy_is_accepted_although_its_base_is_refused() -> None:
    trainer = make_trainer()
    refuses = {"Strategy": "no."}
    check_conflicts([named("Picky", refuses=refuses, accepts=frozenset({"SingleDeviceStrategy"}))], trainer, Tiny())
    with pytest.raises(MisconfigurationException, match=r"Picky can't work with SingleDeviceStrategy: no\."):
        check_conflicts([named("Picky", refuses=refuses, accepts=frozenset({"Other"}))], trainer, Tiny())


def test_manual_optimization() -> None:
    class Manual(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))

    picky = named("Picky", manual_optimization="it owns the step. Set `automatic_optimization = True`.")
    with pytest.raises(
        MisconfigurationException, match=r"Picky can't work with manual optimization: it owns the step\."
    ):
        fit(Manual(), picky)
    fit(Manual(), named("Easy"))
    fit(Tiny(), picky)


def test_installed_once_a_fit_in_the_order_of_the_plan_and_the_hooks_called_in_it_too() -> None:
    calls: list[str] = []

    class Base(AccelCallback):
        contract = contract()

        def install(self, trainer: Any, pl_module: LightningModule) -> None:
            calls.append(f"install {type(self).__name__}")

        def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
            calls.append(f"start {type(self).__name__}")

    last = type("Last", (Base,), {"contract": contract(touches=frozenset({"gradients"}))})()
    first = type("First", (Base,), {"contract": contract(touches=frozenset({"weights"}))})()
    between = At("on_train_start", lambda *_: calls.append("start user's"))
    trainer = make_trainer(last, between, first)
    before = trainer.callbacks
    trainer.fit(Tiny(), loader())
    assert calls == ["install First", "install Last", "start First", "start user's", "start Last"]
    assert trainer.callbacks is before
    assert before == [last, between, first]


def test_callbacks_that_were_added_meanwhile_are_kept() -> None:
    added = At("on_train_end", lambda *_: None)
    add = At("on_train_start", lambda trainer, _: trainer.callbacks.append(added))
    trainer = fit(Tiny(), named("A", "input"), add)
    assert trainer.callbacks[-1] is added


def test_callbacks_from_the_module_are_part_of_the_plan() -> None:
    calls: list[str] = []

    class FromModule(AccelCallback):
        contract = contract()

        def install(self, trainer: Any, pl_module: LightningModule) -> None:
            calls.append("installed")

    class Module(Tiny):
        def configure_callbacks(self) -> list[Callback]:
            return [FromModule()]

    fit(Module())
    assert calls == ["installed"]


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    neutral = type("Neutral", (AccelCallback,), {"contract": contract(expects="less"), "is_neutral": True})()
    touching = named("Touching", "gradients", "input", acts="every batch", expects="more")
    fit(Tiny(), neutral, touching)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    assert rows == [
        ["1", "Touching", "input, gradients", "every batch", "more"],
        ["2", "Neutral", "", "never", "nothing (neutral settings)"],
    ]


def test_a_narrow_table_has_whole_names() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(Plan([GradientAccumulation(4)], make_trainer()).table())
    assert "GradientAccumulation" in console.export_text()


def test_no_table_in_a_barebones_fit_nor_on_other_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(named("A", "input"), barebones=True, max_epochs=1)
    trainer.fit(Tiny(), loader())
    assert "lightning_accel plan" not in capsys.readouterr().out
    trainer = make_trainer(named("A", "input"))
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    trainer.fit(Tiny(), loader())
    assert "lightning_accel plan" not in capsys.readouterr().out


def test_no_plan_without_a_fit(capsys: pytest.CaptureFixture[str]) -> None:
    class Module(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    class Never(AccelCallback):
        contract: Contract = contract(once=True)

        def install(self, trainer: Any, pl_module: LightningModule) -> None:
            raise AssertionError

    make_trainer(Never(), Never(a=1)).validate(Module(), loader(), verbose=False)
    assert "plan" not in capsys.readouterr().out
