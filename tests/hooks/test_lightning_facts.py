"""What the hooks rely on in Lightning: each test fails when Lightning changes it, before a user finds out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_accel.hooks.callback import BATCH_HOOKS
from tests.hooks.common import At, Data, Stop, Tiny, Validated, fit, loader, make_trainer, none_at, save_at, stop_at

RESUMED = "ignore:You're resuming from a checkpoint that ended before"


def test_order_of_a_fit(tmp_path: Any) -> None:
    fit(Tiny(), save_at("on_train_epoch_end", tmp_path / "a.ckpt"))
    events: list[str] = []

    class Module(Tiny):
        def setup(self, stage: str) -> None:
            events.append("module setup")

        def configure_model(self) -> None:
            events.append("configure_model")

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            events.append("module on_load_checkpoint")

        def configure_optimizers(self) -> Any:
            events.append("configure_optimizers")
            return super().configure_optimizers()

        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            events.append("module weights")
            return super().load_state_dict(*args, **kwargs)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            events.append(f"validation, sanity check: {self.trainer.sanity_checking}")

    class Digits(Data):
        def setup(self, stage: str) -> None:
            events.append("datamodule setup")

        def val_dataloader(self) -> Any:
            return loader(1)

    class Hooks(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            events.append("callback state")

    for hook in (
        "setup",
        "on_load_checkpoint",
        "on_fit_start",
        "on_train_start",
        "on_train_end",
        "on_fit_end",
        "teardown",
    ):
        setattr(Hooks, hook, lambda self, *args, hook=hook, **kwargs: events.append(f"callback {hook}"))
    fit(Module(), save_at("on_train_epoch_end", tmp_path / "b.ckpt"), Hooks(), data=Digits())
    assert events == [
        "datamodule setup",
        "callback setup",
        "module setup",
        "configure_model",
        "configure_optimizers",
        "callback on_fit_start",
        "validation, sanity check: True",
        "callback on_train_start",
        "validation, sanity check: False",
        "callback on_train_end",
        "callback on_fit_end",
        "callback teardown",
    ]
    events.clear()
    fit(Module(), Hooks(), data=Digits(), max_epochs=2, ckpt_path=tmp_path / "b.ckpt")
    begin = events.index("configure_model")
    assert events[begin : begin + 7] == [
        "configure_model",
        "module on_load_checkpoint",
        "module weights",
        "callback on_load_checkpoint",
        "callback state",
        "configure_optimizers",
        "callback on_fit_start",
    ]


def test_order_of_a_step() -> None:
    events: list[str] = []

    class Module(Tiny):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            events.append("on_after_batch_transfer")
            return batch

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            events.append("training_step")
            return super().training_step(batch, batch_idx)

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            events.append("clipping")

    class Hooks(Callback):
        pass

    class Optimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            events.append("stepped")
            return loss

    hooks = "on_train_batch_start on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step"
    for hook in [*hooks.split(), "on_train_batch_end"]:
        setattr(Hooks, hook, lambda self, *args, hook=hook, **kwargs: events.append(hook))
    fit(Module(lambda module: Optimizer(module.parameters(), lr=0.1)), Hooks(), data=loader(1))
    assert events == [
        "on_after_batch_transfer",
        "on_train_batch_start",
        "training_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "clipping",
        "stepped",
        "on_train_batch_end",
    ]


def test_what_on_train_batch_start_returns_is_thrown_away() -> None:
    class Hooks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> Any:
            return [torch.full_like(batch[0], 7.0), batch[1]]

    module = Tiny()
    fit(module, Hooks())
    assert torch.equal(module.seen[0], next(iter(loader()))[0])


def test_the_datamodule_owns_the_transfer_hook_where_it_overrides_it() -> None:
    owners = []

    def look(trainer: Any, module: LightningModule) -> None:
        owners.append(trainer._data_connector._datahook_selector.get_instance("on_after_batch_transfer"))

    module, data = Tiny(), Data()
    fit(module, At("setup", look), data=data)
    assert owners == [data]  # it is known in `setup` already
    assert module.seen[0].min() > 90
    owners.clear()
    fit(module, At("setup", look))
    assert owners == [module]


def test_an_attribute_of_the_instance_wins() -> None:
    """Lightning looks each of the patched methods up on the instance, each time."""
    calls: list[str] = []

    def call(original: Any, name: str, *args: Any) -> Any:
        calls.append(name)
        return original(*args)

    def patch(trainer: Any, module: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        for owner, name in [
            (module, "configure_optimizers"),
            (module, "on_after_batch_transfer"),
            (loop, "_accumulated_batches_reached"),
            (loop.automatic_optimization, "_make_zero_grad_fn"),
            (trainer.strategy, "teardown"),
        ]:
            setattr(owner, name, functools.partial(call, getattr(owner, name), name))

    fit(Tiny(), At("setup", patch), data=loader(2))
    assert calls.count("configure_optimizers") == 1
    assert calls.count("on_after_batch_transfer") == 2
    assert calls.count("_make_zero_grad_fn") == 2
    assert calls.count("_accumulated_batches_reached") >= 4  # before the step, for schedulers, for validation
    assert calls[-1] == "teardown"


def test_windows_are_decided_by_accumulated_batches_reached_and_the_last_batch() -> None:
    steps: list[int] = []

    def patch(trainer: Any, module: Any) -> None:
        trainer.fit_loop.epoch_loop._accumulated_batches_reached = lambda: trainer.fit_loop.batch_idx == 1

    note = At("on_train_batch_end", lambda trainer, _: steps.append(trainer.global_step))
    fit(Tiny(), At("setup", patch), note)
    assert steps == [0, 1, 1, 1, 2]


def test_zero_grad_is_made_for_the_batch_and_the_factor_of_that_moment() -> None:
    """The trap: with a factor that changes in mid-epoch, stepping and zeroing go by different windows."""
    zeroed: list[int] = []
    steps: list[int] = []

    def change(trainer: Any, module: Any) -> None:
        trainer.accumulate_grad_batches = 2 if trainer.fit_loop.batch_idx >= 3 else 1

    fit(
        Tiny(),
        At("on_train_batch_start", change),
        At("on_before_zero_grad", lambda trainer, _: zeroed.append(trainer.fit_loop.batch_idx)),
        At("on_train_batch_end", lambda trainer, _: steps.append(trainer.global_step)),
        data=loader(8),
    )
    assert steps == [1, 2, 3, 4, 4, 5, 5, 6]  # stepped at batch 3, then every other one
    assert zeroed == [0, 1, 2, 4, 6]  # but never before batch 3: it steps on the gradients of batch 2 too


def test_the_loss_is_divided_by_the_factor_of_that_moment() -> None:
    losses: list[float] = []

    class Hooks(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            trainer.accumulate_grad_batches = 4

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
            losses.append(loss.item())

    module = Tiny()
    with torch.no_grad():
        expected = module.loss(next(iter(loader()))).item() / 4
    fit(module, Hooks(), data=loader(1))
    assert losses == pytest.approx([expected])


@pytest.mark.filterwarnings(RESUMED)
def test_a_resume_in_mid_epoch_announces_no_epoch_start_and_restores_callbacks_before_loops(tmp_path: Any) -> None:
    fit(Tiny(), save_at("on_train_batch_end", tmp_path / "a.ckpt", on=1))
    events: list[Any] = []

    class Hooks(At):
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            events.append(("state", trainer.fit_loop.epoch_loop.batch_progress.total.ready))

    def note(trainer: Any, module: Any) -> None:
        events.append(("on_train_start", trainer.fit_loop.epoch_loop.batch_progress.total.ready))

    fit(Tiny(), Hooks("on_train_start", lambda *_: None), save_at("on_train_batch_end", tmp_path / "b.ckpt", on=1))
    trainer = make_trainer(
        Hooks("on_train_start", note),
        At("on_train_epoch_start", lambda *_: events.append("epoch")),
        At("on_train_batch_start", lambda trainer, _: events.append(trainer.fit_loop.batch_idx), on=0),
        max_epochs=2,
    )
    trainer.fit(Tiny(), loader(), ckpt_path=tmp_path / "b.ckpt")
    assert events == [("state", 0), ("on_train_start", 2), 2, "epoch"]


def test_estimated_stepping_batches_is_a_property_that_reads_the_factor_and_loads_the_data() -> None:
    assert isinstance(Trainer.estimated_stepping_batches, property)
    estimates: list[float] = []

    def estimate(module: Tiny) -> Any:
        trainer = module.trainer
        estimates.append(trainer.num_training_batches)
        for trainer.accumulate_grad_batches in (1, 2):
            estimates.append(trainer.estimated_stepping_batches)
        trainer.accumulate_grad_batches = 1
        return torch.optim.SGD(module.parameters(), lr=0.1)

    fit(Tiny(estimate), max_epochs=3)
    assert estimates == [float("inf"), 15, 9]


def test_counters_at_each_hook() -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def note(hook: str) -> At:
        def look(trainer: Any, module: Any) -> None:
            batch, epoch = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress.current
            counts = (batch.total.ready, batch.total.processed, batch.current.ready, batch.current.processed)
            seen[hook] = (*counts, epoch.ready, epoch.started, epoch.processed, trainer.global_step)

        return At(hook, look)

    hooks = "on_train_start on_train_epoch_start on_train_batch_start on_before_optimizer_step on_train_batch_end"
    hooks += " on_validation_start on_train_epoch_end on_train_end"
    trainer = make_trainer(*map(note, hooks.split()), max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(Validated(), loader(3), loader(1))
    assert seen == {  # in the second epoch's last batch: batches ready, processed, in the epoch; epochs; steps
        "on_train_start": (0, 0, 0, 0, 0, 0, 0, 0),
        "on_train_epoch_start": (3, 3, 3, 3, 2, 1, 1, 3),
        "on_train_batch_start": (6, 5, 3, 2, 2, 2, 1, 5),
        "on_before_optimizer_step": (6, 5, 3, 2, 2, 2, 1, 5),
        "on_train_batch_end": (6, 6, 3, 3, 2, 2, 1, 6),
        "on_validation_start": (6, 6, 3, 3, 2, 2, 1, 6),
        "on_train_epoch_end": (6, 6, 3, 3, 2, 2, 2, 6),
        "on_train_end": (6, 6, 3, 3, 2, 2, 2, 6),
    }


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_train_batch_end"])
@pytest.mark.filterwarnings(RESUMED)
def test_the_total_of_processed_batches_numbers_them_alike_after_an_exception(tmp_path: Any, hook: str) -> None:
    """``ready`` counts the batch in flight twice: once before the exception, once in the resumed run."""
    save = At("on_exception", lambda trainer, _: trainer.save_checkpoint(tmp_path / "a.ckpt"))
    with pytest.raises(Stop):
        fit(Tiny(), stop_at(hook, on=2), save)
    counts: list[tuple[int, int, int]] = []

    def note(trainer: Any, module: Any) -> None:
        total = trainer.fit_loop.epoch_loop.batch_progress.total
        counts.append((trainer.fit_loop.batch_idx, total.processed, total.ready))

    fit(Tiny(), At("on_train_batch_start", note), ckpt_path=tmp_path / "a.ckpt")
    done = 3 if hook == "on_train_batch_end" else 2
    assert counts[0][:2] == (done, done)
    assert (counts[0][2] > done + 1) == (done == 2)


def test_gradients_that_another_fit_left_are_gone_when_training_starts() -> None:
    """Or they would pass for the partial gradients of an accumulation window that is resumed."""
    module, seen = Tiny(), []
    fit(module)
    assert module.layer.weight.grad is not None
    fit(module, At("on_train_start", lambda _, module: seen.append(module.layer.weight.grad)))
    assert seen == [None]


def test_the_strategy_is_torn_down_after_every_callback_has_seen_the_exception() -> None:
    events: list[str] = []

    def patch(trainer: Any, module: Any) -> None:
        original = trainer.strategy.teardown
        trainer.strategy.teardown = lambda: (events.append("strategy"), original())

    note = At("on_exception", lambda *_: events.append("callback"))
    with pytest.raises(Stop):
        fit(Tiny(), At("setup", patch), note, stop_at("on_train_batch_end"), At("on_exception", note.on_exception))
    assert events == ["callback", "callback", "strategy"]


def test_a_hook_iterates_over_the_list_it_began_with_and_the_next_one_takes_the_new_list() -> None:
    calls: list[str] = []

    def replace(trainer: Any, module: Any) -> None:
        trainer.callbacks = list(reversed(trainer.callbacks))

    class Hooks(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def setup(self, *args: Any, **kwargs: Any) -> None:
            calls.append(f"setup {self.name}")

        def on_train_start(self, *args: Any) -> None:
            calls.append(f"start {self.name}")

    fit(Tiny(), At("setup", replace), Hooks("a"), Hooks("b"))
    assert calls == ["setup a", "setup b", "start b", "start a"]


def test_a_batch_that_is_none_reaches_the_transfer_hook_but_no_callback_and_counts() -> None:
    transferred: list[bool] = []

    class Module(Tiny):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            transferred.append(batch is None)
            return batch

    module, seen = Module(), []
    note = At(
        "on_train_batch_start", lambda trainer, _: seen.append(trainer.fit_loop.epoch_loop.batch_progress.total.ready)
    )
    with pytest.warns(UserWarning, match="yielded None"):
        fit(module, note, data=none_at(1, batches=3))
    assert transferred == [False, True, False]
    assert seen == [1, 3]
    assert len(module.seen) == 2


def test_a_hook_that_is_not_callable_is_passed_over() -> None:
    """What `AccelCallback.mute_batch_hooks` relies on."""
    callback = Callback()
    for name in BATCH_HOOKS:
        vars(callback)[name] = None
    assert fit(Tiny(), callback).global_step > 0


def test_the_hooks_of_a_batch() -> None:
    """`BATCH_HOOKS` has every hook that is called at every batch of a fit."""
    called: dict[str, int] = {}
    names = [name for name in vars(Callback) if name.startswith("on_")]
    hooks = {name: lambda self, *_, name=name, **__: called.update({name: called.get(name, 0) + 1}) for name in names}
    trainer = fit(Tiny(), type("Counter", (Callback,), hooks)())
    assert {name for name, count in called.items() if count >= trainer.global_step} == set(BATCH_HOOKS)
