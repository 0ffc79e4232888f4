from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_accel.errors import NoEffectWarning
from lightning_accel.hooks import AccelCallback
from lightning_accel.hooks.callback import BATCH_HOOKS
from tests.hooks.common import At, Data, Stop, Tiny, Validated, contract, fit, loader, make_trainer, save_at, stop_at


class Doubling(AccelCallback):
    """Doubles the loss, so that a fit with it, and without it after it, can be told apart."""

    contract = contract(touches=frozenset({"loss"}))

    def __init__(self, factor: float = 2.0, note: Any = None) -> None:
        super().__init__(factor=factor)
        self.factor = factor
        self.note = [] if note is None else note

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.patch(pl_module, "training_step", self.call)
        self.on_undo(lambda: self.note.append(f"undo {self.factor:g}"))

    def call(self, original: Any, batch: Any, batch_idx: int) -> Any:
        return self.factor * original(batch, batch_idx)


class Other(Doubling):
    contract = contract(touches=frozenset({"gradients"}))


def clean(module: LightningModule, *others: Any) -> bool:
    """Whether no patch is left on the module, and none of a Trainer."""
    owners = [module, *others]
    return not any("Patched" in type(value).__name__ for owner in owners for value in vars(owner).values())


def test_a_patch_acts_during_the_fit_and_is_undone_after_it() -> None:
    plain, module = Tiny(), Tiny()
    fit(plain, max_steps=1)
    trainer = fit(module, Doubling(), max_steps=1)
    start = Tiny().layer.weight
    assert torch.allclose(module.layer.weight - start, 2 * (plain.layer.weight - start))
    assert clean(module, trainer.strategy)
    assert "training_step" not in vars(module)
    assert module.training_step == Tiny.training_step.__get__(module)


def test_patches_are_undone_in_the_reverse_order_and_an_own_attribute_is_put_back() -> None:
    note: list[str] = []
    module = Tiny()
    own = module.training_step
    module.training_step = own  # type: ignore[method-assign]
    fit(module, Other(3.0, note), Doubling(2.0, note))
    assert note == ["undo 3", "undo 2"]
    assert vars(module)["training_step"] is own


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()])
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_batch_end", "on_train_end"])
def test_undone_after_an_exception(hook: str, error: BaseException) -> None:
    note: list[str] = []
    module = Tiny()
    trainer = make_trainer(Doubling(2.0, note), stop_at(hook, error=error))
    with pytest.raises((Stop, SystemExit)):
        trainer.fit(module, loader())
    assert note == ["undo 2"]
    assert clean(module, trainer.strategy)
    assert not vars(trainer.strategy).get("teardown")
    fit(module, Doubling(2.0, note), max_steps=1)
    assert note == ["undo 2", "undo 2"]


def test_undone_after_an_exception_in_install_and_in_the_training_step() -> None:
    note: list[str] = []

    class Broken(AccelCallback):
        contract = contract(touches=frozenset({"gradients"}))

        def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise Stop

    module = Tiny()
    doubling, user = Doubling(2.0, note), At("on_train_end", lambda *_: None)
    trainer = make_trainer(Broken(), user, doubling)
    before = list(trainer.callbacks)
    with pytest.raises(Stop):
        trainer.fit(module, loader())
    assert note == ["undo 2"]
    assert clean(module)
    assert trainer.callbacks == before
    assert doubling.plan is None

    class Raising(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise Stop

    raising = Raising()
    with pytest.raises(Stop):
        fit(raising, doubling)
    assert clean(raising)


def test_an_exception_while_undoing_does_not_keep_the_others_from_it() -> None:
    note: list[str] = []

    class Broken(Doubling):
        contract = contract(touches=frozenset({"gradients"}))

        def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
            def fail() -> None:
                raise Stop

            self.on_undo(fail)

    module = Tiny()
    with pytest.raises(Stop):
        fit(module, Doubling(2.0, note), Broken())
    assert note == ["undo 2"]
    assert clean(module)


def test_a_second_fit_and_validation_after_a_fit() -> None:
    once, twice, again = Tiny(), Validated(), Tiny()
    fit(once, Doubling(), max_epochs=2)
    callback = Doubling()
    trainer = make_trainer(callback, num_sanity_val_steps=0)
    trainer.fit(twice, loader(), loader(1))
    assert clean(twice)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(twice, loader(), loader(1))
    assert torch.equal(once.layer.weight, twice.layer.weight)
    fit(again, callback)  # one callback, two Trainers in turn
    fit(again, callback)
    assert torch.equal(once.layer.weight, again.layer.weight)
    trainer.validate(twice, loader(), verbose=False)
    trainer.test(twice, loader(), verbose=False)
    assert clean(twice)


def test_a_fit_whose_end_was_never_announced_is_undone_by_the_next_one() -> None:
    note: list[str] = []
    module = Tiny()
    # an exception in `on_exception` keeps Lightning from tearing anything down
    trainer = make_trainer(Doubling(2.0, note), stop_at("on_train_end"), stop_at("on_exception", error=ValueError()))
    with pytest.raises(ValueError):
        trainer.fit(module, loader())
    other = Tiny()
    fit(other, trainer.callbacks[0])
    assert note == ["undo 2", "undo 2"]
    assert clean(module)
    assert clean(other)


def test_a_checkpoint_that_is_saved_on_an_exception_still_sees_the_patches(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Module(Tiny):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append("training_step" in vars(self))

    save = At("on_exception", lambda trainer, _: trainer.save_checkpoint(tmp_path / "a.ckpt"))
    module = Module()
    with pytest.raises(Stop):
        # a checkpoint callback is always the last of the list
        fit(module, Doubling(), stop_at("on_train_batch_end"), ModelCheckpoint(), save, enable_checkpointing=True)
    assert seen == [True]
    assert clean(module)


def test_deep_copies_and_pickles_of_a_patched_module_are_without_patches(tmp_path: Path) -> None:
    copies: list[Any] = []

    def make(trainer: Trainer, module: LightningModule) -> None:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copies.extend(
            [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
        )
        assert not clean(module)

    module = Tiny()
    batch = next(iter(loader()))
    fit(module, Doubling(), Other(), At("on_train_batch_start", make, on=0))
    for duplicate in copies:
        assert clean(duplicate)
        assert duplicate.training_step.__self__ is duplicate
        assert torch.equal(duplicate.training_step(batch, 0), Tiny().training_step(batch, 0))
        fit(duplicate, Doubling(), Other())
        assert torch.equal(duplicate.layer.weight, module.layer.weight)


def test_callbacks_can_be_pickled_before_and_after_a_fit() -> None:
    callback = Doubling()
    assert pickle.loads(pickle.dumps(callback)).state_key == callback.state_key
    fit(Tiny(), callback)
    assert copy.deepcopy(pickle.loads(pickle.dumps(callback))).plan is None


def decorated(function: Any) -> Any:
    import functools

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Decorated(Tiny):
    @decorated
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.loss(batch)


@pytest.mark.parametrize("patches", [0, 1, 2, 3])
def test_signatures_and_overrides_read_the_same_through_patches(patches: int) -> None:
    """Lightning unwraps once, drops the first argument as ``self``, and compares code objects."""

    class Forwarding(Doubling):
        contract = contract(touches=frozenset({"loss"}))

        def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for name in ("training_step", "on_after_batch_transfer", "on_train_epoch_end"):
                self.patch(pl_module, name, lambda original, *args, **kwargs: original(*args, **kwargs))

    seen: list[Any] = []

    def look(trainer: Trainer, module: LightningModule) -> None:
        seen.append(
            (
                is_overridden("training_step", module),
                is_overridden("on_after_batch_transfer", module),
                is_overridden("on_train_epoch_end", module),
                is_param_in_hook_signature(module.training_step, "batch_idx", explicit=True),
                is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2),
                is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True),
            )
        )

    callbacks = [Forwarding(float(number)) for number in range(patches)]
    fit(Tiny(), *callbacks, At("on_train_start", look))
    # a decorated step without a batch index must not be given one
    fit(Decorated(), *callbacks, At("on_train_start", look))
    assert seen == [(True, False, False, True, True, False), (True, False, False, False, False, False)]


def test_several_patches_of_the_hook_of_a_datamodule() -> None:
    """Lightning asks ``is_overridden`` of the patched datamodule at every batch."""

    class Adding(AccelCallback):
        contract = contract(touches=frozenset({"input"}))

        def install(self, trainer: Any, pl_module: LightningModule) -> None:
            self.patch(trainer.datamodule, "on_after_batch_transfer", self.add)

        def add(self, original: Any, batch: Any, dataloader_idx: int) -> Any:
            batch = original(batch, dataloader_idx)
            return [batch[0] + 1000, batch[1]]

    module = Tiny(lr=1e-12)
    fit(module, *[Adding(number=number) for number in range(3)], data=Data())
    assert 3090 < module.seen[0].min() < 3110


def test_the_state_key_tells_two_of_one_class_apart_and_has_no_addresses() -> None:
    class Made(AccelCallback):
        contract = contract()

    keys = [
        Made(amount=0.5).state_key,
        Made(amount=0.6).state_key,
        Made(layers=[nn.Linear(2, 3), "a", (1, None)], table={"a": object()}).state_key,
    ]
    assert len(set(keys)) == 3
    assert keys[0].endswith("Made{'amount': 0.5}")
    assert "in_features=2, out_features=3" in keys[2]
    assert "0x" not in "".join(keys)


def test_the_arguments_stay_the_callers_own() -> None:
    class Made(AccelCallback):
        contract = contract()

    argument = {"a": [1, 2]}
    callback = Made(argument=argument)
    fit(Tiny(), callback)
    assert argument == {"a": [1, 2]}


class Counting(AccelCallback):
    contract = contract()
    count = 0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_states_of_two_of_one_class_and_a_warning_about_other_arguments(tmp_path: Path) -> None:
    a, b = Counting(number=1), Counting(number=2)
    b.count = 10
    fit(Tiny(), a, b, save_at("on_train_epoch_end", tmp_path / "a.ckpt"))
    a, b = Counting(number=1), Counting(number=2)
    fit(Tiny(), b, a, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert (a.count, b.count) == (10, 20)
    other = Counting(number=3)
    with pytest.warns(UserWarning, match=r"holds the state of .*'number': 1.*, but this run has .*'number': 3.*afresh"):
        fit(Tiny(), other, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert other.count == 5


def test_no_effect_warning() -> None:
    class Idle(AccelCallback):
        contract = contract()

        def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.warn_no_effect("no layer matched.")

    with pytest.warns(NoEffectWarning, match=r"^Idle has no effect: no layer matched\.$"):
        fit(Tiny(), Idle())


def test_changes_outside_a_fit_are_an_error() -> None:
    module = Tiny()
    with pytest.raises(RuntimeError, match="none is running"):
        Doubling().patch(module, "training_step", print)
    assert clean(module)


def test_a_plain_callback_sees_the_module_patched_in_every_hook_of_the_fit() -> None:
    patched: list[bool] = []
    hooks = ["on_fit_start", "on_train_start", "on_train_end", "on_fit_end"]
    watchers: list[Callback] = [At(hook, lambda _, module: patched.append(not clean(module))) for hook in hooks]
    fit(Tiny(), Doubling(), *watchers)
    assert patched == [True] * 4


def test_hooks_that_do_nothing_are_not_called() -> None:
    seen: list[dict[str, Any]] = []

    class Half(AccelCallback):
        contract = contract()

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            seen.append({name: getattr(self, name) for name in BATCH_HOOKS})

    class Neutral(Half):
        is_neutral = True

    half, neutral = Half(), Neutral()
    fit(Tiny(), half, neutral)
    assert seen and all([name for name in BATCH_HOOKS if hooks[name]] == ["on_train_batch_start"] for hooks in seen)
    assert all(callable(getattr(callback, name)) for callback in (half, neutral) for name in BATCH_HOOKS)
