from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer

from lightning_accel.hooks import FitLength, Moment, fit_length, moment
from tests.hooks.common import At, Stop, Tiny, Validated, fit, loader, make_trainer, none_at, save_at, stop_at, stream

RESUMED = "ignore:You're resuming from a checkpoint that ended before"
HOOKS = "on_train_start on_train_epoch_start on_train_batch_start on_before_optimizer_step on_train_batch_end"
HOOKS += " on_validation_start on_train_epoch_end on_train_end"


def watch(**options: Any) -> dict[str, list[Moment]]:
    """The moments at each hook of a fit of 2 epochs of 4 batches, or as the options say."""
    seen: dict[str, list[Moment]] = {hook: [] for hook in HOOKS.split()}
    callbacks = [At(hook, lambda trainer, _, hook=hook: seen[hook].append(moment(trainer))) for hook in seen]
    callbacks += options.pop("callbacks", [])
    data, ckpt_path = options.pop("data", loader(4)), options.pop("ckpt_path", None)
    trainer = make_trainer(*callbacks, **{"max_epochs": 2, "num_sanity_val_steps": 0, **options})
    trainer.fit(Validated(), data, loader(1), ckpt_path=ckpt_path)
    return seen


def at(step: int, batch: int, epoch: float, fit: float | None) -> Moment:
    return Moment(step, batch, epoch, fit)


def test_every_hook_of_a_fit_limited_by_epochs() -> None:
    seen = watch()
    before = [at(n, n, n / 4, n / 8) for n in range(8)]
    after = [at(n, n, n / 4, n / 8) for n in range(1, 9)]
    assert seen == {
        "on_train_start": [at(0, 0, 0.0, 0.0)],
        "on_train_epoch_start": [at(0, 0, 0.0, 0.0), at(4, 4, 1.0, 0.5)],
        "on_train_batch_start": before,
        "on_before_optimizer_step": before,
        "on_train_batch_end": after,
        "on_validation_start": [at(4, 4, 1.0, 0.5), at(8, 8, 2.0, 1.0)],
        "on_train_epoch_end": [at(4, 4, 1.0, 0.5), at(8, 8, 2.0, 1.0)],
        "on_train_end": [at(8, 8, 2.0, 1.0)],
    }


def test_accumulation_and_the_steps() -> None:
    seen = watch(accumulate_grad_batches=2)["on_train_batch_start"]
    assert [now.step for now in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [now.batch for now in seen] == list(range(8))


@pytest.mark.parametrize(("max_steps", "max_epochs"), [(6, -1), (6, None), (6, 100)])
def test_a_fit_limited_by_steps(max_steps: int, max_epochs: int | None) -> None:
    seen = watch(max_steps=max_steps, max_epochs=max_epochs)
    assert [now.fit for now in seen["on_train_batch_start"]] == [n / 6 for n in range(6)]
    assert seen["on_train_end"] == [at(6, 6, 2.0, 1.0)]


def test_whatever_limit_is_nearest_counts() -> None:
    seen = watch(max_steps=100, max_epochs=2)
    assert seen["on_train_end"][0].fit == 1.0
    assert seen["on_train_batch_start"][4].fit == 0.5


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_an_endless_fit_has_no_fraction() -> None:
    seen = watch(max_epochs=-1, callbacks=[stop_after(6)])
    assert [now.fit for now in seen["on_train_batch_start"]] == [None] * 6
    assert [now.epoch for now in seen["on_train_batch_start"]] == [0, 0.25, 0.5, 0.75, 1.0, 1.25]


def stop_after(batches: int) -> Callback:
    def stop(trainer: Any, _: Any) -> None:
        trainer.should_stop = True

    return At("on_train_batch_end", stop, on=batches - 1)


def test_a_loader_without_a_length_counts_whole_epochs() -> None:
    seen = watch(data=stream(4))
    assert [now.epoch for now in seen["on_train_batch_start"]] == [0.0] * 4 + [1.0] * 4
    assert [now.fit for now in seen["on_train_batch_start"]] == [0.0] * 4 + [0.5] * 4
    assert [now.batch for now in seen["on_train_batch_start"]] == list(range(8))
    steps = watch(data=stream(4), max_steps=8, max_epochs=-1)
    assert [now.fit for now in steps["on_train_batch_start"]] == [n / 8 for n in range(8)]


@pytest.mark.parametrize("limit", [2, 0.5])
def test_limit_train_batches(limit: float) -> None:
    seen = watch(limit_train_batches=limit)
    assert [now.epoch for now in seen["on_train_batch_start"]] == [0.0, 0.5, 1.0, 1.5]
    assert seen["on_train_end"] == [at(4, 4, 2.0, 1.0)]


def test_a_limit_beyond_the_length() -> None:
    assert watch(limit_train_batches=100)["on_train_end"] == [at(8, 8, 2.0, 1.0)]


def test_batches_that_are_none_are_batches() -> None:
    with pytest.warns(UserWarning, match="yielded None"):
        seen = watch(data=none_at(1, batches=4))
    assert [now.batch for now in seen["on_train_batch_start"]] == [0, 2, 3, 4, 6, 7]


class Clock(Timer):
    """A Timer of ten seconds, of which one passes a batch."""

    def __init__(self) -> None:
        super().__init__({"seconds": 10})
        self.now = 0.0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.now += 1
        super().on_train_batch_end(*args, **kwargs)

    def time_elapsed(self, stage: Any = None) -> float:
        return self.now


def test_a_fit_limited_by_time() -> None:
    seen = watch(max_epochs=3, callbacks=[Clock()])
    batches = seen["on_train_batch_start"]
    assert [now.fit for now in batches] == pytest.approx([max(n / 10, n / 12) for n in range(10)])
    assert watch(max_epochs=1, callbacks=[Clock()])["on_train_batch_start"][3].fit == 0.75  # epochs are nearer


def test_the_trainers_own_time_limit() -> None:
    seen = watch(max_epochs=-1, max_time={"seconds": 1.5})["on_train_batch_start"]
    fractions = [now.fit for now in seen if now.fit is not None]
    assert len(fractions) == len(seen) > 1
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < 0.5 < fractions[-1] <= 1


@pytest.mark.filterwarnings(RESUMED)
@pytest.mark.parametrize("done", [1, 3, 4])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_before_zero_grad", "on_train_batch_start", "on_exception"])
def test_a_resumed_fit_counts_on(tmp_path: Path, done: int, hook: str) -> None:
    path = tmp_path / "a.ckpt"
    if hook == "on_exception":
        with pytest.raises(Stop):
            fit(Tiny(), stop_at("on_train_batch_start", on=done), save_at(hook, path), data=loader(4), max_epochs=2)
    else:
        index = done - 1 if hook == "on_train_batch_end" else done
        fit(Tiny(), save_at(hook, path, on=index), data=loader(4), max_epochs=2)
    seen, whole = watch(ckpt_path=path, max_epochs=4), watch(max_epochs=4)
    for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        assert seen[name] == whole[name][done:]
    assert seen["on_train_end"] == whole["on_train_end"]
    assert seen["on_train_epoch_end"] == whole["on_train_epoch_end"][-len(seen["on_train_epoch_end"]) :]
    assert seen["on_train_epoch_start"] == whole["on_train_epoch_start"][-len(seen["on_train_epoch_start"]) :]
    assert seen["on_train_start"] == [at(done, done, done / 4, done / 16)]


def length(**options: Any) -> FitLength:
    seen: list[FitLength] = []
    options = {"max_epochs": 2, "data": loader(5), **options}
    note = At("on_train_start", lambda trainer, _: seen.append(fit_length(trainer)))
    fit(Tiny(), note, stop_after(1), **options)
    return seen[0]


def test_fit_length() -> None:
    assert length() == FitLength(steps=10, batches=10, epochs=2)
    assert length(accumulate_grad_batches=2) == FitLength(steps=6, batches=10, epochs=2)
    assert length(limit_train_batches=2) == FitLength(steps=4, batches=4, epochs=2)
    assert length(max_steps=7) == FitLength(steps=7, batches=10, epochs=2)
    assert length(max_steps=7, max_epochs=-1) == FitLength(steps=7, batches=None, epochs=None)
    assert length(max_epochs=-1) == FitLength(steps=None, batches=None, epochs=None)
    assert length(data=stream()) == FitLength(steps=None, batches=None, epochs=2)
    assert length(data=stream(), max_steps=7) == FitLength(steps=7, batches=None, epochs=2)


def test_fit_length_in_configure_optimizers_loads_the_data_first() -> None:
    seen: list[FitLength] = []

    class Module(Tiny):
        def configure_optimizers(self) -> Any:
            seen.append(fit_length(self.trainer))
            return super().configure_optimizers()

    fit(Module(), max_epochs=2)
    assert seen == [FitLength(steps=10, batches=10, epochs=2)]


@pytest.mark.filterwarnings(RESUMED)
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end", "on_validation_start", "on_train_end"])
@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_a_fit_resumed_from_the_end_of_an_epoch_or_from_validation_counts_on(
    tmp_path: Path, hook: str, interval: float
) -> None:
    path = tmp_path / "a.ckpt"
    trainer = make_trainer(save_at(hook, path, on=0), num_sanity_val_steps=0, max_epochs=1, val_check_interval=interval)
    trainer.fit(Validated(), loader(4), loader(1))
    done = 2 if interval == 0.5 and "validation" in hook else 4
    seen = watch(ckpt_path=path, max_epochs=3)
    assert [now.epoch for now in seen["on_train_batch_start"]] == [n / 4 for n in range(done, 12)]
    assert [now.epoch for now in seen["on_train_batch_end"]] == [n / 4 for n in range(done + 1, 13)]
    assert [now.fit for now in seen["on_train_batch_start"]] == [n / 12 for n in range(done, 12)]
    assert seen["on_train_end"] == [at(12, 12, 3.0, 1.0)]
