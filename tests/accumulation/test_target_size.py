"""Windows that have a target size, in samples or tokens; their resume; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_accel import ExactResume, GradientAccumulation
from tests.accumulation.text import (
    BATCHES,
    TOKENS,
    Batch,
    Steps,
    Text,
    adamw,
    by_hand,
    by_tokens,
    check,
    gradient,
    joined,
    loader,
    make_batches,
    one_cycle,
    ours,
    sgd,
    up_to,
    weights,
    windows_of,
)
from tests.hooks.common import fit, make_trainer, save_at


def test_up_to_a_number_of_tokens() -> None:
    target, lengths = 15, windows_of(15)
    assert len(set(lengths)) > 1
    check(up_to(target), lengths * 2, max_epochs=2)
    check(up_to(target), lengths * 2, max_epochs=2, stream=True)


def test_weights_of_batches_in_windows_of_tokens() -> None:
    module, steps = Text(), Steps()
    fit(module, up_to(sum(TOKENS), weight_by="batches"), steps, data=loader(BATCHES), max_epochs=2)
    mean = Text()
    sum(mean.loss(batch) / len(BATCHES) for batch in BATCHES).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(steps.gradients[0], gradient(mean), rtol=1e-5, atol=1e-7)
    assert steps.ends == [7, 14]


def test_up_to_a_number_of_samples_where_the_loader_has_no_batch_size() -> None:
    check(up_to(5, "samples"), [2, 2, 3], over="sentences")


def sentences(batch_size: int, count: int = 12) -> Any:
    """A loader that collates sentences itself, and so has a batch size."""
    return DataLoader(make_batches([1] * count), batch_size=batch_size, collate_fn=joined)  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch_size", "ends"), [(1, [6, 12]), (2, [3, 6]), (3, [2, 4]), (6, [1, 2])])
def test_the_factor_follows_from_the_batch_size_and_the_schedule_from_the_factor(
    batch_size: int, ends: list[int]
) -> None:
    steps = Steps()
    trainer = fit(
        Text(one_cycle), GradientAccumulation(target_batch_size=6), steps, data=sentences(batch_size), max_epochs=3
    )
    assert steps.ends[:2] == ends
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == trainer.global_step == 6


def test_a_target_that_is_no_multiple_is_said_once_with_the_size_of_a_step() -> None:
    steps = Steps()
    with pytest.warns(
        UserWarning, match=r"target_batch_size=8 .* the 3 samples .* takes 3 of them, 9 samples\.$"
    ) as said:
        fit(Text(one_cycle), GradientAccumulation(target_batch_size=8), steps, data=sentences(3), max_epochs=3)
    assert len(ours(said)) == 1
    assert steps.ends[:2] == [3, 4]


def test_the_factor_follows_again_when_the_batch_size_changes() -> None:
    class Module(Text):
        def train_dataloader(self) -> Any:
            return sentences(1 + self.current_epoch)

    steps = Steps()
    trainer = make_trainer(
        GradientAccumulation(target_batch_size=6), steps, max_epochs=3, reload_dataloaders_every_n_epochs=1
    )
    trainer.fit(Module())
    assert steps.ends == [6, 12, 15, 18, 20, 22]


def test_a_target_below_one_batch_is_refused_for_samples_and_said_for_tokens() -> None:
    with pytest.raises(MisconfigurationException, match=r"has 4 samples in all, more than target_batch_size=3: give"):
        fit(Text(), GradientAccumulation(target_batch_size=3), data=sentences(4))
    steps = Steps()
    with pytest.warns(UserWarning, match=rf"has {TOKENS[0]} tokens in all, more than target_batch_size=1, so") as said:
        fit(Text(), up_to(1), steps, data=loader(BATCHES))
    assert len(ours(said)) == 1
    assert steps.ends == [1, 2, 3, 4, 5, 6, 7]


def test_the_number_of_steps_is_unknown_or_that_of_the_trainer_where_tokens_are_counted() -> None:
    found: list[float] = []

    def configure(module: Text) -> Any:
        found.append(module.trainer.estimated_stepping_batches)
        return sgd(module)

    with pytest.warns(UserWarning, match="How many optimizer steps this fit will have is unknown"):
        fit(Text(configure), up_to(15), data=loader(BATCHES))
    fit(Text(configure), up_to(15), data=loader(BATCHES), max_steps=4, max_epochs=10)
    fit(Text(configure), up_to(15), data=loader(BATCHES), max_steps=4, max_epochs=-1)
    assert found == [float("inf"), 4, 4]
    trainer = fit(Text(one_cycle), up_to(15), data=loader(BATCHES), max_steps=4, max_epochs=-1)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == trainer.global_step == 4


class Noted(Text):
    """Logs the number of the batch, from 1."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.log("batch", float(self.trainer.fit_loop.total_batch_idx + 1))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("callback", "ends"), [(GradientAccumulation({0: 1, "3step": 2}), [1, 2, 3, 4, 6, 8]), (up_to(15), None)]
)
def test_metrics_are_logged_every_n_steps_whatever_a_window_takes(callback: Callback, ends: list[int] | None) -> None:
    class Log(DummyLogger):
        def log_metrics(self, metrics: Any, *args: Any, step: int, **kwargs: Any) -> None:
            logged.append((step, int(metrics["batch"])))

    logged: list[tuple[int, int]] = []
    steps = Steps()
    fit(Noted(), callback, steps, data=loader(BATCHES[:4]), max_epochs=2, logger=Log(), log_every_n_steps=2)
    assert ends is None or steps.ends == ends
    assert logged == [(number - 1, steps.ends[number - 1]) for number in range(2, len(steps.ends) + 1, 2)]


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("on", [0, 1, 4, 8])
@pytest.mark.parametrize(
    "make",
    [
        by_tokens,
        lambda: by_tokens({0: 2, "3step": 3}),
        lambda: up_to(15),
        lambda: up_to(15, weight_by="batches"),
        lambda: up_to(5, "samples"),
    ],
)
def test_exact_resume_inside_a_window(tmp_path: Path, make: Any, on: int) -> None:
    whole, resumed, path = Text(adamw), Text(adamw), tmp_path / "a.ckpt"
    first, second = Steps(), Steps()
    options = {"data": loader(BATCHES), "max_epochs": 2}
    fit(whole, make(), ExactResume(), first, save_at("on_train_batch_end", path, on), **options)
    fit(resumed, make(), ExactResume(), second, ckpt_path=path, **options)
    assert torch.equal(weights(whole), weights(resumed))
    assert second.ends == [end for end in first.ends if end > on + 1]
    assert all(torch.equal(a, b) for a, b in zip(reversed(first.gradients), reversed(second.gradients), strict=False))


@pytest.mark.parametrize("on", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: up_to(15), lambda: loader(BATCHES)),
        (lambda: GradientAccumulation(target_batch_size=6), lambda: sentences(2)),
        (lambda: by_tokens(2), lambda: loader(BATCHES)),
    ],
)
def test_a_resumed_run_logs_at_the_same_steps(tmp_path: Path, make: Any, data: Any, on: int) -> None:
    class Log(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[tuple[int, int]] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.steps.append((int(step or 0), int(metrics["batch"])))

    whole, resumed, path = Log(), Log(), tmp_path / "a.ckpt"
    options = {"data": data(), "max_epochs": 2, "log_every_n_steps": 1}
    fit(Noted(), make(), ExactResume(), save_at("on_train_batch_end", path, on), logger=whole, **options)
    fit(Noted(), make(), ExactResume(), logger=resumed, ckpt_path=path, **options)
    assert resumed.steps == [(step, batch) for step, batch in whole.steps if batch > on + 1]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize(
    ("make", "on", "said"),
    [
        (by_tokens, 1, "2 of 3 micro-batches in"),
        (lambda: up_to(sum(TOKENS[:3])), 1, f"{sum(TOKENS[:2])} of {sum(TOKENS[:3])} tokens in"),
    ],
)
def test_without_exact_resume_what_is_left_of_a_window_is_weighed_right(
    tmp_path: Path, make: Any, on: int, said: str
) -> None:
    path, module, steps = tmp_path / "a.ckpt", Text(), Steps()
    fit(Text(), make(), save_at("on_train_batch_end", path, on), data=loader(BATCHES))
    with pytest.warns(UserWarning, match=said):
        fit(module, make(), steps, data=loader(BATCHES), ckpt_path=path)
    # the loader starts again, but the epoch has only five batches left
    expected = by_hand([BATCHES[: steps.ends[0] - on - 1]])[1][0]
    torch.testing.assert_close(steps.gradients[0], expected, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_lbfgs_is_refused() -> None:
    def configure(module: LightningModule) -> Any:
        return torch.optim.LBFGS(module.parameters())

    with pytest.raises(MisconfigurationException, match=r"can't work with LBFGS, .*: use batches of the full size, or"):
        fit(Text(configure), GradientAccumulation(2), data=loader(BATCHES))
    fit(Text(configure), GradientAccumulation(1), data=loader(BATCHES[:1]))


def test_an_engine_with_windows_of_its_own_is_refused() -> None:
    module = Text()
    module.zenflow = True  # as a DeepSpeed engine has it
    with pytest.raises(MisconfigurationException, match=r"can't work with ZenFlow, .*: remove one of them\."):
        fit(module, GradientAccumulation(2), data=loader(BATCHES))


@pytest.mark.parametrize(
    ("key", "has"),
    [
        ("mask", "has the keys 'inputs', 'labels', but got 'mask'"),
        ("inputs.mask", "but got 'inputs.mask'"),
        (0, "but got 0"),
    ],
)
def test_a_key_that_is_not_in_the_batch(key: Any, has: str) -> None:
    with pytest.raises(ValueError, match=f"Expected `count_key` to name an item of the batch, .*{has}"):
        fit(Text(), GradientAccumulation(2, weight_by="tokens", count_key=key), data=loader(BATCHES))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"factor": 2, "target_batch_size": 8},
            ValueError,
            "`target_batch_size` to be None where `factor` is given, but got 8",
        ),
        ({"target_batch_size": 0}, ValueError, "`target_batch_size` to be an int of at least 1, but got 0"),
        ({"target_batch_size": 8.0}, TypeError, "`target_batch_size` to be an int of at least 1, but got 8.0"),
        ({"unit": "tokens"}, ValueError, "`unit` to be given with `target_batch_size` only, but got 'tokens'"),
        (
            {"target_batch_size": 8, "unit": "words"},
            ValueError,
            "`unit` to be one of 'samples', 'tokens', but got 'words'",
        ),
        ({"target_batch_size": 8, "unit": "tokens"}, ValueError, "`count_key` to name the targets, .*, but got None"),
        ({"weight_by": "tokens"}, ValueError, "`count_key` to name the targets, .*, but got None"),
        (
            {"weight_by": "words"},
            ValueError,
            "`weight_by` to be one of 'batches', 'samples', 'tokens', but got 'words'",
        ),
        ({"count_key": "labels"}, ValueError, "`count_key` to be None where nothing is counted .*, but got 'labels'"),
        (
            {"count_key": 1.5, "weight_by": "tokens"},
            TypeError,
            "`count_key` to be a key or an index of the batch, but got 1.5",
        ),
        ({"ignore_index": None}, TypeError, "`ignore_index` to be an int, but got None"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Expected {message}\\.$"):
        GradientAccumulation(**arguments)


def test_what_is_neutral() -> None:
    assert GradientAccumulation(1).is_neutral
    assert not by_tokens(1).is_neutral
    assert not GradientAccumulation(target_batch_size=8).is_neutral
