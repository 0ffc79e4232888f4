from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_accel import GradientAccumulation, GradientClipping
from lightning_accel.optimizers.gradient_clipping import clip_units_, unit_norms
from tests.conformance.compare import assert_equal
from tests.conformance.toy import Digits, UnvalidatedDigits, make_trainer, run, train_loader


class Gradients(Callback):
    """The gradients that each step is made with (an optimizer's hook sees them after all clipping), and the weights."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.weights: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.weights = {f"{name}!": parameter.detach().clone() for name, parameter in pl_module.named_parameters()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def keep(*_: Any) -> None:
            gradients = {name: parameter.grad.clone() for name, parameter in pl_module.named_parameters()}
            self.seen.append({**gradients, **self.weights})

        trainer.optimizers[0].register_step_post_hook(keep)


def fit(*callbacks: Callback, **arguments: Any) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    watch = Gradients()
    trainer = make_trainer([*callbacks, watch], max_epochs=1, enable_checkpointing=False, **arguments)
    trainer.fit(UnvalidatedDigits(regular=False, scheduler=None, optimizer="sgd"), train_loader(shuffle=False))
    assert trainer.gradient_clip_val == arguments.get("gradient_clip_val")
    return watch.seen


def total(seen: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.pow(2).sum()) for name, value in seen.items() if not name.endswith("!")))


@pytest.mark.parametrize(("by", "threshold"), [("norm", 0.05), ("value", 0.002)])
def test_norm_and_value_are_those_of_the_trainer(by: Any, threshold: float) -> None:
    ours = fit(GradientClipping(threshold, by=by))
    theirs = fit(gradient_clip_val=threshold, gradient_clip_algorithm=by)
    assert_equal(ours, theirs, "gradients and weights of each step")
    assert total(fit()[0]) > 1.5 * total(ours[0])


def test_the_gradient_of_a_whole_window_is_clipped() -> None:
    seen = fit(GradientClipping(0.05), GradientAccumulation(4))
    assert [total(step) for step in seen] == pytest.approx([0.05] * 3, rel=1e-4)


def by_hand(weight: Tensor, gradient: Tensor, fraction: float, eps: float) -> Tensor:
    """The paper's equation, unit by unit."""
    units = [(weight, gradient)] if weight.dim() < 2 else list(zip(weight, gradient, strict=True))
    out = []
    for w, g in units:
        bound = fraction * max(float(w.norm()), eps)
        out.append(g * bound / g.norm() if g.norm() > bound else g)
    return out[0] if weight.dim() < 2 else torch.stack(out)


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 3, 2, 2), (4, 1, 5)])
def test_the_adaptive_bound_is_the_papers(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    for scale in (0.0, 0.05, 1.0):
        parameter = nn.Parameter(torch.randn(shape) * scale)
        parameter.grad = torch.randn(shape) * 0.01
        expected = by_hand(parameter.detach(), parameter.grad.clone(), 0.02, 1e-3)
        clip_units_([parameter], 0.02)
        torch.testing.assert_close(parameter.grad, expected)


def test_low_precision_norms_are_in_float32() -> None:
    assert unit_norms(torch.full((1, 4), 300.0, dtype=torch.float16)).item() == 600  # its square overflows there
    parameter = nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16))
    parameter.grad = torch.ones(2, 4, dtype=torch.bfloat16)
    clip_units_([parameter, nn.Parameter(torch.ones(2))], 0.5)
    assert_equal(parameter.grad, torch.full((2, 4), 0.5, dtype=torch.bfloat16), "the gradient")


def test_the_adaptive_way_in_a_fit() -> None:
    plain, seen = fit()[0], fit(GradientClipping(0.001, by="adaptive", exclude=["head"]))[0]
    for name in plain:
        if not name.endswith("!"):
            clipped = by_hand(plain[f"{name}!"], plain[name], 0.001, 1e-3)
            expected = plain[name] if name.startswith("head") else clipped
            torch.testing.assert_close(seen[name], expected, msg=name)
    assert not torch.equal(seen["conv.weight"], plain["conv.weight"])


def test_what_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`exclude` to match names of parameters, but 'tail' matches none of conv"):
        fit(GradientClipping(by="adaptive", exclude=["head", "tail"]))


def test_two_who_clip_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"Trainer\(gradient_clip_val=1.0\): both would clip"):
        fit(GradientClipping(), gradient_clip_val=1.0)


def test_an_exception_gives_the_trainer_its_settings_back() -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("out of coffee")

    trainer = make_trainer([GradientClipping(0.3), Fails()], max_epochs=1, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="coffee"):
        trainer.fit(UnvalidatedDigits(scheduler=None), train_loader())
    assert trainer.gradient_clip_val is None and trainer.gradient_clip_algorithm is None


def test_the_defaults() -> None:
    assert [GradientClipping(by=by).threshold for by in ("norm", "value", "adaptive")] == [1.0, 0.5, 0.01]


def test_excluding_needs_the_adaptive_way() -> None:
    with pytest.raises(ValueError, match="`exclude` to be used with by='adaptive', but got by='norm'"):
        GradientClipping(exclude=["head"])


def test_a_module_that_clips_by_itself_decides() -> None:
    class Own(Digits):
        def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, **_: Any) -> None:
            asked.append(gradient_clip_val)

    asked: list[float] = []
    run([GradientClipping(0.3)], Own, max_epochs=1)
    assert set(asked) == {0.3}
