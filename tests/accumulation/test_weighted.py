"""Windows of batches with unequal numbers of tokens or samples, against one big batch; and windows of a target size."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_accel import GradientAccumulation
from tests.accumulation.text import (
    BATCHES,
    Batch,
    Steps,
    Text,
    adamw,
    by_hand,
    by_tokens,
    check,
    cut,
    gradient,
    loader,
    make_batches,
    ours,
    sgd,
    up_to,
    weights,
    windows_of,
)
from tests.hooks.common import At, fit


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("factor", "lengths"),
    [(3, [3, 3, 1]), (2, [2, 2, 2, 1]), (5, [5, 2]), (100, [7]), ({0: 1, "4step": 2}, [1] * 4 + [2, 1])],
)
def test_by_tokens_a_window_is_one_big_batch(factor: Any, lengths: list[int], stream: bool) -> None:
    check(by_tokens(factor), lengths, stream=stream)


@pytest.mark.parametrize("key", ["labels", "inputs.attention_mask"])
def test_every_epoch_and_by_a_mask_inside_the_batch(key: str) -> None:
    check(GradientAccumulation(3, weight_by="tokens", count_key=key), [3, 3, 1] * 3, max_epochs=3)


@pytest.mark.parametrize("key", ["labels", None])
def test_by_samples_a_window_is_one_big_batch(key: str | None) -> None:
    check(GradientAccumulation(3, weight_by="samples", count_key=key), [3, 3, 1], over="sentences")


def test_what_the_built_in_and_weights_of_batches_get_wrong() -> None:
    for options in ({"accumulate_grad_batches": 3}, {}):
        steps = Steps()
        callbacks = [steps] if options else [GradientAccumulation(3), steps]
        fit(Text(), *callbacks, data=loader(BATCHES), **options)
        expected = by_hand(cut([3, 3, 1]))[1][0]
        assert (steps.gradients[0] - expected).norm() / expected.norm() > 0.02


class Clipped(Text):
    """Writes down the gradient that it clips."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped: list[Tensor] = []

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clipped.append(gradient(self))
        super().configure_gradient_clipping(optimizer, *args, **kwargs)


def test_clipping_sees_the_weighed_gradient() -> None:
    module = Clipped()
    fit(module, by_tokens(), data=loader(BATCHES), gradient_clip_val=0.1)
    final, gradients = by_hand(cut([3, 3, 1]), clip=0.1)
    torch.testing.assert_close(module.clipped, gradients, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights(module), final, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [[4, 4, 4, 4, 4, 4], [2, 6, 3, 1, 5, 4]])
def test_batches_of_equal_counts_and_windows_of_one_are_bit_for_bit_the_unweighed_run(lengths: list[int]) -> None:
    batches = make_batches([2] * 6, lengths=lengths)
    factor = 2 if len(set(lengths)) == 1 else 1
    plain, weighed = Text(adamw), Text(adamw)
    fit(plain, GradientAccumulation(factor), data=loader(batches), max_epochs=2)
    fit(weighed, by_tokens(factor), data=loader(batches), max_epochs=2)
    assert torch.equal(weights(plain), weights(weighed))


def test_logged_losses_are_those_of_the_module() -> None:
    class Module(Text):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    def note(trainer: Trainer, module: Any) -> None:
        found.append(float(trainer.callback_metrics["loss"]))

    found: list[float] = []
    fit(
        Module(lambda module: torch.optim.SGD(module.parameters(), lr=1e-12)),
        by_tokens(),
        At("on_train_batch_end", note),
        data=loader(BATCHES),
    )
    assert found == pytest.approx([Text().loss(batch).item() for batch in BATCHES], rel=1e-5)


def test_a_step_without_a_loss_counts_nothing() -> None:
    class Module(Text):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    steps = Steps()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        fit(Module(), by_tokens(), steps, data=loader(BATCHES))
    torch.testing.assert_close(steps.gradients[0], by_hand([[BATCHES[0], BATCHES[2]]])[1][0], rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------ mixed precision


class Scaler:
    """What MixedPrecision needs of a GradScaler, with a note of the calls; a step with inf is skipped."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.found_inf = False

    def scale(self, loss: Tensor) -> Tensor:
        return loss * 1024

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for item in gradients:
            item /= 1024
        self.found_inf = not all(bool(item.isfinite().all()) for item in gradients)
        self.calls.append("unscale")

    def step(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> Any:
        self.calls.append("skip" if self.found_inf else "step")
        return None if self.found_inf else optimizer.step()

    def update(self) -> None:
        self.calls.append("update")


@pytest.mark.parametrize(("callback", "lengths"), [(by_tokens(), [3, 3, 1]), (up_to(15), windows_of(15))])
def test_a_scaler_unscales_and_looks_for_inf_then_the_gradient_is_weighed_clipped_and_used(
    monkeypatch: Any, callback: Callback, lengths: list[int]
) -> None:
    calls: list[str] = []

    class Module(Clipped):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            calls.append("clip")
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = Scaler(calls)  # type: ignore[assignment]
    monkeypatch.setattr(precision, "forward_context", lambda: torch.autocast("cpu", enabled=False))
    module = Module()
    fit(module, callback, data=loader(BATCHES), plugins=[precision], gradient_clip_val=0.1)
    final, gradients = by_hand(cut(lengths), clip=0.1)
    assert calls == ["unscale", "clip", "step", "update"] * len(lengths)
    torch.testing.assert_close(module.clipped, gradients, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights(module), final, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_the_real_scaler(fused: bool) -> None:
    """Its clipping is refused with a fused optimizer, which unscales by itself."""

    def configure(module: Text) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.5, fused=fused)

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    precision.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    module, clip = Text(configure), 0.0 if fused else 0.1
    nothing = make_batches([1, 1], lengths=[0, 0])
    batches = [*BATCHES[:4], *nothing, *BATCHES[4:6]]
    with pytest.warns(UserWarning, match="Nothing counts in the batches up to number 5 of epoch 0"):
        fit(module, by_tokens(2), data=loader(batches), plugins=[precision], gradient_clip_val=clip)
    final, _ = by_hand(cut([2, 2, 2]), clip=clip)
    torch.testing.assert_close(weights(module), final, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ nothing counts, and what is not finite


@pytest.mark.parametrize("configure", [sgd, adamw])
def test_a_window_in_which_nothing_counts_is_skipped_and_said(configure: Any) -> None:
    batches = [*BATCHES[:2], *make_batches([2, 1], lengths=[0, 0]), BATCHES[2], *make_batches([3], lengths=[0])]
    module, steps = Text(configure), Steps()
    with pytest.warns(UserWarning) as said:
        trainer = fit(module, by_tokens(2), steps, data=loader(batches), max_epochs=2)
    texts = ours(said)
    assert len(texts) == 2
    assert "Nothing counts in the batches up to number 3 of epoch 0" in texts[0]
    assert texts[1].startswith("2 optimizer steps were skipped")
    final, _ = by_hand([batches[:2], batches[4:5]] * 2, Text(configure))
    torch.testing.assert_close(weights(module), final, rtol=1e-5, atol=1e-6)
    assert trainer.global_step == 6  # they count as steps, for schedules and intervals


def test_one_window_is_skipped_and_said_once() -> None:
    with pytest.warns(UserWarning, match="Nothing counts") as said:
        fit(Text(), by_tokens(1), data=loader(make_batches([2, 2], lengths=[0, 3])))
    assert len(ours(said)) == 1


@pytest.mark.parametrize("callback", [by_tokens(2), GradientAccumulation(2)])
def test_a_gradient_that_is_not_finite_is_said_once(callback: Callback) -> None:
    class Module(Text):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 3 else 1.0)

    with pytest.warns(UserWarning) as said:
        fit(Module(), callback, data=loader(BATCHES))
    (message,) = ours(said)
    assert message.startswith(
        "The gradient of the 2 batches up to number 3 of epoch 0 holds inf or NaN (the loss of batch 3)"
    )


def test_a_finite_loss_whose_gradient_is_not() -> None:
    class Module(Text):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (self.net[0].weight * 0).sum().sqrt()

    with pytest.warns(UserWarning, match="though the losses here are finite"):
        fit(Module(), by_tokens(2), data=loader(BATCHES[:2]))


def test_sparse_gradients_are_weighed_too() -> None:
    class Sparse(Text):
        def __init__(self) -> None:
            super().__init__()
            self.embed.sparse = True

    module = Sparse()
    fit(module, by_tokens(3), data=loader(BATCHES))
    torch.testing.assert_close(weights(module), by_hand(cut([3, 3, 1]))[0], rtol=1e-5, atol=1e-6)
