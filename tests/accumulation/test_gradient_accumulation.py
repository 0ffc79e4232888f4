"""GradientAccumulation against what a reader can work out by hand."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lightning_accel import ExactResume, GradientAccumulation
from lightning_accel.hooks import Moment
from tests.hooks.common import (
    At,
    Data,
    Tiny,
    Validated,
    fit,
    loader,
    make_trainer,
    none_at,
    samples,
    save_at,
    stream,
)

RESUMED = "ignore:You're resuming from a checkpoint that ended before"
NONE = "ignore:train_dataloader yielded None"


class Watch(At):
    """The batches since the last optimizer step, the batches of each zero_grad, and the gradients of each step."""

    def __init__(self) -> None:
        self.windows: list[int] = []
        self.zeroed: list[int] = []
        self.gradients: list[Tensor] = []
        self.losses: list[float] = []
        self.open = 0

    def on_before_zero_grad(self, trainer: Trainer, *args: Any) -> None:
        self.zeroed.append(trainer.fit_loop.total_batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.open += 1
        self.losses.append(loss.item())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.windows.append(self.open)
        self.open = 0
        self.gradients.append(pl_module.layer.weight.grad.clone())


def by_hand(module: Tiny, windows: list[int], batches: int, lr: float = 0.1) -> list[Tensor]:
    """The gradients of plain SGD whose steps take so many batches each, as one big batch; ``module`` is trained."""
    gradients, (x, y) = [], samples(batches).tensors
    begin = 0
    for length in windows:
        if begin >= batches:
            begin = 0
        part = slice(4 * begin, 4 * (begin + length))
        module.zero_grad()
        ((module.layer(x[part]) - y[part]) ** 2).mean().backward()
        gradients.append(module.layer.weight.grad.clone())  # type: ignore[union-attr]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= lr * parameter.grad  # type: ignore[operator]
        begin += length
    return gradients


def check(windows: list[int], factor: Any, data: Any = None, batches: int = 5, **options: Any) -> tuple[Tiny, Watch]:
    """Fit, and compare the windows, the gradients, where they were zeroed, the steps and the weights."""
    module, watch, reference = Tiny(), Watch(), Tiny()
    trainer = fit(
        module, GradientAccumulation(factor), watch, data=loader(batches) if data is None else data, **options
    )
    assert watch.windows == windows
    for actual, expected in zip(watch.gradients, by_hand(reference, windows, batches), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.layer.weight, reference.layer.weight, rtol=1e-5, atol=1e-6)
    assert watch.zeroed == [sum(windows[:number]) for number in range(len(windows))]
    assert trainer.global_step == len(windows)
    assert trainer.accumulate_grad_batches == 1
    return module, watch


@pytest.mark.parametrize(
    ("factor", "batches", "windows"),
    [
        (2, 4, [2, 2]),
        (2, 5, [2, 2, 1]),
        (3, 5, [3, 2]),
        (4, 5, [4, 1]),
        (5, 5, [5]),
        (100, 5, [5]),
        (1, 3, [1, 1, 1]),
    ],
)
def test_the_gradient_of_a_window_is_that_of_one_big_batch(factor: int, batches: int, windows: list[int]) -> None:
    check(windows * 2, factor, batches=batches, max_epochs=2)


@pytest.mark.parametrize(("limit", "windows"), [(3, [2, 1]), (0.6, [2, 1]), (100, [2, 2, 1])])
def test_limit_train_batches(limit: float, windows: list[int]) -> None:
    module, watch = Tiny(), Watch()
    fit(module, GradientAccumulation(2), watch, limit_train_batches=limit)
    assert watch.windows == windows
    reference = Tiny()
    gradients = by_hand(reference, windows, sum(windows))
    torch.testing.assert_close(watch.gradients[-1], gradients[-1])


def test_a_loader_of_unknown_length() -> None:
    _, watch = check([3, 2] * 2, 3, batches=5, max_epochs=2)
    _, unknown = check([3, 2] * 2, 3, data=stream(5), batches=5, max_epochs=2)
    for a, b in zip(watch.gradients, unknown.gradients, strict=True):
        torch.testing.assert_close(a, b)
    check([4, 1], 4, data=stream(5), batches=5)
    check([5], 9, data=stream(5), batches=5)


def test_a_limit_beyond_the_end_of_a_loader_of_unknown_length() -> None:
    """Lightning does not look ahead then, and so takes no batch for the last: as with its own accumulation."""
    plain = Watch()
    fit(Tiny(), plain, data=stream(5), accumulate_grad_batches=3, limit_train_batches=50)
    assert plain.windows == [3]
    with pytest.warns(
        UserWarning, match=r"its last 2 batches made no optimizer step, .* `limit_train_batches` to it\."
    ):
        fit(Tiny(), GradientAccumulation(3), watch := Watch(), data=stream(5), limit_train_batches=50)
    assert watch.windows == [3]


@pytest.mark.filterwarnings(NONE)
def test_an_epoch_whose_last_batch_is_none() -> None:
    with pytest.warns(UserWarning, match="its last 1 batches made no optimizer step"):
        fit(Tiny(), GradientAccumulation(3), data=none_at(4))


@pytest.mark.parametrize(
    ("factor", "windows"),
    [
        ({0: 2}, [2, 2, 2, 2, 2, 2]),
        ({0: 1, 1: 3}, [1, 1, 1, 1, 3, 1, 3, 1]),
        ({1: 4}, [1, 1, 1, 1, 4, 4]),
        ({"0.5epoch": 4}, [1, 1, 2, 4, 4]),
        ({"2step": 4, "4step": 2}, [1, 1, 2, 4, 2, 2]),
        ({"5batch": 3}, [1, 1, 1, 1, 1, 3, 3, 1]),
        ({0: 1, "0.5fit": 4}, [1, 1, 1, 1, 1, 1, 2, 4]),
        ({"0.5fit": 4, 0: 1}, [1] * 12),  # the last entry that is reached holds
        ({"0fit": 2, "1fit": 4}, [2, 2, 2, 2, 2, 2]),
    ],
)
def test_a_schedule_in_every_unit(factor: dict[Any, int], windows: list[int]) -> None:
    check(windows, factor, batches=4, max_epochs=3)


def test_a_fraction_of_a_fit_that_is_limited_by_steps() -> None:
    check([1, 1, 1, 1, 1, 1, 2, 1], {"0.625fit": 2}, batches=3, max_epochs=-1, max_steps=8)


def test_a_fraction_of_an_endless_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a fit with a known end to place '0\.5fit' in it"):
        fit(Tiny(), GradientAccumulation({"0.5fit": 2}), max_epochs=-1)


def test_the_loss_is_divided_by_what_really_is_in_the_window() -> None:
    """So the gradients of a short window need no second look where the length is known."""
    module, watch, scales = Tiny(lr=1e-12), Watch(), []
    note = At("on_train_batch_start", lambda trainer, _: scales.append(trainer.accumulate_grad_batches))
    fit(module, GradientAccumulation(3), watch, note)
    with torch.no_grad():
        whole = [Tiny().loss(batch).item() for batch in loader()]
    assert scales == [3, 3, 3, 2, 2]
    assert watch.losses == pytest.approx([loss / scale for loss, scale in zip(whole, scales, strict=True)])


def test_what_the_built_in_gets_wrong_in_the_short_last_window() -> None:
    """Lightning divides it by the whole factor; when that changes, the page must too."""
    module, watch = Tiny(), Watch()
    fit(module, watch, accumulate_grad_batches=4)
    expected = by_hand(Tiny(), [4, 1], 5)
    torch.testing.assert_close(watch.gradients[0], expected[0])
    torch.testing.assert_close(watch.gradients[1], expected[1] / 4)


def test_neutral_is_the_plain_run_bit_for_bit_and_installs_nothing() -> None:
    for factor in (1, {0: 1, "0.5fit": 1}):
        plain, module, callback = Tiny(), Tiny(), GradientAccumulation(factor)
        assert callback.is_neutral
        seen: list[Any] = []
        fit(plain, max_epochs=2)
        note = At("on_train_start", lambda trainer, _, seen=seen: seen.append(vars(trainer.fit_loop.epoch_loop)))
        fit(module, callback, note, max_epochs=2)
        assert torch.equal(plain.layer.weight, module.layer.weight)
        assert "_accumulated_batches_reached" not in seen[0]
    assert not GradientAccumulation({0: 1, 5: 2}).is_neutral


def test_bit_for_bit_lightnings_own_accumulation_where_that_is_right() -> None:
    plain, module = Tiny(), Tiny()
    fit(plain, data=loader(6), max_epochs=2, accumulate_grad_batches=3)
    fit(module, GradientAccumulation(3), data=loader(6), max_epochs=2)
    assert torch.equal(plain.layer.weight, module.layer.weight)


def one_cycle(module: Tiny) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    total = int(module.trainer.estimated_stepping_batches)
    return [optimizer], [{"scheduler": OneCycleLR(optimizer, max_lr=0.5, total_steps=total), "interval": "step"}]


@pytest.mark.parametrize(
    ("factor", "options"),
    [
        (3, {"max_epochs": 3}),
        ({0: 1, 1: 4}, {"max_epochs": 3}),
        ({"0.5fit": 2, "7step": 5}, {"max_epochs": 4}),
        ({0: 2, "0.5fit": 3}, {"max_epochs": 4, "max_steps": 7}),
        ({"0.3fit": 2}, {"max_epochs": -1, "max_steps": 9}),
    ],
)
def test_the_schedule_of_one_cycle_ends_exactly_at_the_end(factor: Any, options: dict[str, Any]) -> None:
    module = Tiny(one_cycle)
    trainer = fit(module, GradientAccumulation(factor), **options)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.total_steps == trainer.global_step
    assert scheduler.last_epoch == trainer.global_step  # it stepped with each optimizer step
    assert type(trainer) is Trainer  # the estimate is Lightning's own again


@pytest.mark.parametrize("factor", [2, {"4step": 3}])
def test_the_estimate_knows_the_factor_before_the_fit_has_begun(factor: Any) -> None:
    trainer = fit(module := Tiny(one_cycle), GradientAccumulation(factor), max_epochs=2)
    assert module.trainer is trainer
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == {2: 6}.get(factor if factor == 2 else 0, 7)


@pytest.mark.filterwarnings(NONE)
def test_batches_that_are_none_take_no_place_in_a_window() -> None:
    module, watch = Tiny(one_cycle), Watch()
    trainer = fit(module, GradientAccumulation(2), watch, data=none_at(1, 4, 5, batches=8), max_epochs=2)
    assert watch.windows == [2, 2, 1] * 2  # batches 0 and 2; 3 and 6; 7
    assert watch.zeroed == [0, 3, 7, 8, 11, 15]
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == trainer.global_step == 6
    x, y = samples(8).tensors
    first = [*range(0, 4), *range(8, 12)]
    reference = Tiny()
    ((reference.layer(x[first]) - y[first]) ** 2).mean().backward()
    torch.testing.assert_close(watch.gradients[0], reference.layer.weight.grad)


@pytest.mark.filterwarnings(NONE)
def test_an_epoch_that_begins_with_none_begins_a_window() -> None:
    watch = Watch()
    fit(Tiny(), GradientAccumulation(9), watch, data=none_at(0, batches=5), max_epochs=2)
    assert watch.windows == [4, 4]
    assert watch.zeroed == [1, 6]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_takes_a_place_as_in_lightning() -> None:
    class Module(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    watch = Watch()
    trainer = fit(Module(), GradientAccumulation(2), watch, data=loader(6))
    assert trainer.global_step == 3
    assert watch.windows == [2, 1, 2]


def test_skipping_the_rest_of_an_epoch() -> None:
    class Module(Tiny):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 and self.current_epoch == 0 else None

    watch = Watch()
    fit(Module(), GradientAccumulation(2), watch, max_epochs=2)
    assert watch.zeroed == [0, 2, *[watch.zeroed[2] + n for n in (0, 2, 4)]]
    assert watch.windows == [2, 3, 2, 1]  # batch 2 was left without its step, and its gradient zeroed


def test_max_steps_in_mid_epoch() -> None:
    check([2, 2, 1, 2], 2, max_steps=4, max_epochs=-1)


def test_clipping_sees_the_gradient_of_the_window() -> None:
    norms: list[float] = []

    class Module(Tiny):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            norms.append(self.layer.weight.grad.norm().item())  # type: ignore[union-attr]
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            assert nn.utils.get_total_norm([p.grad for p in self.parameters()]) <= 0.1 + 1e-5  # type: ignore[misc]

    fit(Module(lr=1e-9), GradientAccumulation(3), data=stream(5), gradient_clip_val=0.1)
    expected = [gradient.norm().item() for gradient in by_hand(Tiny(), [3, 2], 5, lr=0.0)]
    assert norms == pytest.approx(expected, rel=1e-4)


def test_bf16_mixed() -> None:
    watch = Watch()
    fit(Tiny(), GradientAccumulation(3), watch, precision="bf16-mixed")
    assert watch.windows == [3, 2]
    expected = by_hand(Tiny(), [3, 2], 5)
    torch.testing.assert_close(watch.gradients, expected, rtol=0.05, atol=0.05)


class Scaler:
    """What MixedPrecision needs of a GradScaler, with a note of the calls."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def scale(self, loss: Tensor) -> Tensor:
        self.calls.append("scale")
        return loss * 1024

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("unscale")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 1024

    def step(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> Any:
        self.calls.append("step")
        return optimizer.step()

    def update(self) -> None:
        self.calls.append("update")


def test_fp16_with_a_scaler_unscales_once_a_window_before_a_short_one_is_weighed(monkeypatch: Any) -> None:
    calls: list[str] = []
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = Scaler(calls)  # type: ignore[assignment]
    monkeypatch.setattr(precision, "forward_context", lambda: torch.autocast("cpu", enabled=False))
    module, reference = Tiny(), Tiny()
    fit(module, GradientAccumulation(3), data=stream(5), plugins=[precision])
    step = ["unscale", "step", "update"]
    assert calls == ["scale", "scale", "scale", *step, "scale", "scale", *step]
    by_hand(reference, [3, 2], 5)
    torch.testing.assert_close(module.layer.weight, reference.layer.weight, rtol=1e-5, atol=1e-6)


def test_validation_inside_a_window_leaves_its_gradients() -> None:
    plain, module, watch = Validated(), Validated(), Watch()
    reference = Tiny()
    for fitted, options in ((plain, {}), (module, {"val_check_interval": 1})):
        trainer = make_trainer(GradientAccumulation(3), watch, **options)
        trainer.fit(fitted, loader(), loader(1))
    by_hand(reference, [3, 2], 5)
    assert torch.equal(plain.layer.weight, module.layer.weight)
    torch.testing.assert_close(module.layer.weight, reference.layer.weight, rtol=1e-5, atol=1e-6)


def test_checkpoints_every_n_steps_are_taken_at_optimizer_steps(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(Tiny(), GradientAccumulation({0: 2, "2step": 1}), checkpoint, data=loader(6), enable_checkpointing=True)
    batches = {
        path.stem: torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"][
            "ready"
        ]
        for path in tmp_path.iterdir()
    }
    assert batches == {"step=1": 2, "step=2": 4, "step=3": 5, "step=4": 6}


@pytest.mark.parametrize("how", ["early stopping", "timer", "should_stop"])
def test_a_stop_in_mid_window_takes_no_step_and_the_next_fit_starts_clean(how: str) -> None:
    class Module(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    def stop(trainer: Trainer, module: Any) -> None:
        trainer.should_stop = True

    class TenBatches(Timer):
        now = 0.0

        def time_elapsed(self, stage: Any = None) -> float:
            self.now += 0.5
            return self.now

    class Early(EarlyStopping):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self._run_early_stopping_check(trainer)

    stopper = {
        "early stopping": Early("loss", stopping_threshold=1e9, check_on_train_epoch_end=False),
        "timer": TenBatches(timedelta(seconds=1)),
        "should_stop": At("on_train_batch_end", stop, on=0),
    }[how]
    callback, module, watch = GradientAccumulation(4), Module(), Watch()
    trainer = fit(module, callback, watch, stopper)
    assert trainer.global_step == 0
    assert watch.open >= 1
    again, reference = Watch(), Tiny()
    fit(module, callback, again)
    assert again.windows == [4, 1]
    by_hand(reference, [4, 1], 5)
    torch.testing.assert_close(module.layer.weight, reference.layer.weight, rtol=1e-5, atol=1e-6)


def test_the_datamodule_and_a_second_fit() -> None:
    module, watch = Tiny(lr=1e-9), Watch()
    callback = GradientAccumulation({0: 2, 1: 5})
    fit(module, callback, watch, data=Data(), max_epochs=2)
    fit(module, callback, watch, data=Data(), max_epochs=2)
    assert watch.windows == [2, 2, 1, 5] * 2


# ------------------------------------------------------------------------------------------------------------ resume


FACTORS = [3, {0: 3, "8batch": 2, "2epoch": 4}, {0: 1, "0.4fit": 3}]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("on", [0, 2, 3, 6, 7, 9, 12])
def test_exact_resume_inside_windows_between_them_and_at_the_end_of_an_epoch(
    tmp_path: Path, factor: Any, on: int
) -> None:
    whole, resumed, first, second = Tiny(one_cycle), Tiny(one_cycle), Watch(), Watch()
    path, options = tmp_path / "a.ckpt", {"data": loader(7), "max_epochs": 3}
    fit(whole, GradientAccumulation(factor), ExactResume(), first, save_at("on_train_batch_end", path, on), **options)
    fit(resumed, ExactResume(), GradientAccumulation(factor), second, ckpt_path=path, **options)
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    assert second.losses == first.losses[on + 1 :]
    assert second.zeroed == [batch for batch in first.zeroed if batch > on]
    assert all(torch.equal(a, b) for a, b in zip(reversed(first.gradients), reversed(second.gradients), strict=False))


class Stateful:
    """A loader that Lightning itself brings back to where it was."""

    def __init__(self, batches: int) -> None:
        self.batches = list(loader(batches))
        self.given = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        self.given %= len(self)
        while self.given < len(self):
            self.given += 1
            yield self.batches[self.given - 1]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


@pytest.mark.parametrize("on", [1, 2, 3, 6, 9])
def test_a_resume_without_exact_resume_begins_the_broken_window_anew_and_says_so(
    tmp_path: Path, on: int, recwarn: pytest.WarningsRecorder
) -> None:
    whole, module, first, second, path = Tiny(), Tiny(), Watch(), Watch(), tmp_path / "a.ckpt"
    stop = At("on_train_batch_end", lambda trainer, _: setattr(trainer, "should_stop", True), on=on)
    fit(whole, GradientAccumulation(3), first, data=Stateful(7), max_epochs=2)
    fit(module, GradientAccumulation(3), save_at("on_train_batch_end", path, on), stop, data=Stateful(7), max_epochs=2)
    # `module` has gradients of its own from the first fit: they are not those of the checkpoint's window
    fit(module, GradientAccumulation(3), second, data=Stateful(7), max_epochs=2, ckpt_path=path)
    broken = (on + 1) % 7 % 3
    messages = [str(warning.message) for warning in recwarn if "accumulation window" in str(warning.message)]
    assert len(messages) == (broken > 0)
    begun = [3, 3, 1, 3, 3, 1][{1: 0, 2: 1, 3: 1, 6: 3, 9: 4}[on] :]
    assert second.windows == ([3 - broken, *begun[1:]] if broken else begun)
    if broken:
        assert f"{broken} of 3 micro-batches in" in messages[0]
        assert "Add ExactResume" in messages[0]
        x, y = samples(7).tensors
        state, reference, part = torch.load(path, weights_only=True)["state_dict"], Tiny(), slice(4 * on % 28 + 4, 12)
        reference.load_state_dict(state)
        if on == 1:  # the gradient is the mean of the one micro-batch that was left
            ((reference.layer(x[part]) - y[part]) ** 2).mean().backward()
            torch.testing.assert_close(second.gradients[0], reference.layer.weight.grad)
    else:
        assert torch.equal(whole.layer.weight, module.layer.weight)


def test_the_built_in_schedule_loses_its_factor_on_a_resume_in_mid_epoch(tmp_path: Path) -> None:
    """And GradientAccumulation does not: the case above. When Lightning's does not either, the page must change."""
    path, options = tmp_path / "a.ckpt", {"data": Stateful(8), "max_epochs": 1}
    first, second = Watch(), Watch()
    fit(Tiny(), GradientAccumulationScheduler({0: 4}), first, save_at("on_train_batch_end", path, 3), **options)
    fit(Tiny(), GradientAccumulationScheduler({0: 4}), second, ckpt_path=path, data=Stateful(8))
    assert (first.windows, second.windows) == ([4, 4], [1, 1, 1, 1])


# ----------------------------------------------------------------------------------------------------------- refusals


class Manual(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_refusals() -> None:
    def refused(message: str, *callbacks: Callback, module: Any = None, **options: Any) -> None:
        module = module or Tiny()
        with pytest.raises(MisconfigurationException, match=message):
            fit(module, *callbacks, **options)
        assert "_accumulated_batches_reached" not in vars(module)
        fit(Tiny(), GradientAccumulation(2))  # nothing is left of the refused fit

    for factor in (1, 2):
        refused(
            r"GradientAccumulation can't work with manual optimization: .*Accumulate in `training_step`",
            GradientAccumulation(factor),
            module=Manual(),
        )
        refused(
            r"Trainer\(accumulate_grad_batches=2\) and GradientAccumulation both .*: remove `accumulate_grad",
            GradientAccumulation(factor),
            accumulate_grad_batches=2,
        )
    refused(
        "can't work with GradientAccumulationScheduler: .*Remove the scheduler.",
        GradientAccumulation(2),
        GradientAccumulationScheduler({0: 2}),
    )
    refused("is in the Trainer's callbacks twice", GradientAccumulation(2), GradientAccumulation(3))


def test_deepspeed_is_refused() -> None:
    trainer = make_trainer(callback := GradientAccumulation(2))
    strategy = type("DeepSpeedStrategy", (type(trainer.strategy),), {})
    trainer.strategy.__class__ = strategy
    with pytest.raises(MisconfigurationException, match=r"DeepSpeedStrategy: .*Use ZeROStrategy"):
        trainer.fit(Tiny(), loader())
    assert callback.plan is None


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (0, ValueError, r"Expected `factor` to be an int of at least 1, but got 0\."),
        (-2, ValueError, r"Expected `factor` to be an int of at least 1, but got -2\."),
        (2.0, TypeError, r"Expected `factor` to be an int of at least 1, but got 2\.0\."),
        (True, TypeError, r"Expected `factor` to be an int of at least 1, but got True\."),
        ("4", TypeError, r"Expected `factor` to be an int of at least 1, but got '4'\."),
        (None, TypeError, r"Expected `factor` to be an int of at least 1, but got None\."),
        ({}, ValueError, r"Expected `factor` to have at least one entry, but got {}\."),
        ({0: 0}, ValueError, r"Expected `factor\[0\]` to be an int of at least 1, but got 0\."),
        ({"1fit": "2"}, TypeError, r"Expected `factor\['1fit'\]` to be an int of at least 1, but got '2'\."),
        ({"soon": 2}, ValueError, r"Expected `factor` to be a duration .*, but got 'soon'\."),
        ({"1.5fit": 2}, ValueError, r"Expected `factor` to be in \[0, 1\] of the fit, but got '1\.5fit'\."),
        ({-1: 2}, ValueError, r"Expected `factor` to be a number of epochs of at least 0, but got -1\."),
        ({0.5: 2}, TypeError, r"Expected `factor` to be a duration .*, but got 0\.5\."),
    ],
)
def test_bad_arguments(factor: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        GradientAccumulation(factor)


def test_the_callers_schedule_is_its_own_and_the_key_tells_factors_apart() -> None:
    schedule: dict[Any, int] = {0: 1, "0.5fit": 4}
    callback = GradientAccumulation(schedule)
    key = callback.state_key
    fit(Tiny(), callback)
    assert schedule == {0: 1, "0.5fit": 4}
    assert key != GradientAccumulation({0: 1, "0.5fit": 5}).state_key
    schedule["0.5fit"] = 100
    assert callback.state_key == key
    assert callback.next_factor(Moment(0, 0, 0.0, 1.0)) == 4
