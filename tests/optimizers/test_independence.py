"""Which optimizers step each parameter by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_accel.optimizers.in_backward import step_in_backward_
from lightning_accel.optimizers.independence import why_not_alone
from lightning_accel.optimizers.muon import use_muon_
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from tests.optimizers.test_in_backward import assert_same
from tests.optimizers.toy import model
from tests.strategies.zero_redundancy_fits import GroupNorm, Lion, OwnList, Twice


class Changed(Lion):
    """Changes its gradients before the step."""

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [item for group in self.param_groups for item in group["params"] if item.grad is not None]
        with torch.no_grad():
            self.change(found)
        super().step()
        return loss

    def change(self, found: list[Any]) -> None:
        raise NotImplementedError


class TrustRatio(Changed):
    """By norms of each parameter, as LAMB does."""

    def change(self, found: list[Any]) -> None:
        for parameter in found:
            parameter.grad.mul_(parameter.norm() / parameter.grad.norm())


class Counts(Changed):
    """By a number of its own that rises with each step."""

    steps = 0

    def change(self, found: list[Any]) -> None:
        self.steps += 1
        for parameter in found:
            parameter.grad.add_(parameter, alpha=1 / self.steps)


class Noisy(Changed):
    """By random numbers."""

    def change(self, found: list[Any]) -> None:
        for parameter in found:
            parameter.grad.add_(torch.randn_like(parameter))


class GlobalNorm(Changed):
    """By the norm of all gradients."""

    def change(self, found: list[Any]) -> None:
        nn.utils.clip_grad_norm_(found, 0.01)


def free(parameters: Any) -> Optimizer:
    optimizer: Any = pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=2e-3, warmup_steps=2)
    return optimizer  # type: ignore[no-any-return]


def bnb(parameters: Any) -> Optimizer:
    optimizer: Any = pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, min_8bit_size=256)
    return optimizer  # type: ignore[no-any-return]


ALONE: dict[str, Callable[[Any], Optimizer]] = {
    "Lion": partial(Lion, step_size=1e-3),
    "a trust ratio": partial(TrustRatio, step_size=1e-3),
    "a count": partial(Counts, step_size=1e-3),
    "schedule-free": free,
    "bitsandbytes": bnb,
}
TOGETHER: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "a norm in the group": (partial(GroupNorm, step_size=1e-3), "GroupNorm does something else"),
    "a norm": (partial(GlobalNorm, step_size=1e-3), "GlobalNorm does something else"),
    "a list of its own": (partial(OwnList, step_size=1e-3), "OwnList does something else"),
    "random numbers": (partial(Noisy, step_size=1e-3), "Noisy does something else"),
    "LBFGS": (torch.optim.LBFGS, "LBFGS steps along a line through all parameters at once"),
    "differentiable": (
        partial(torch.optim.Adam, differentiable=True),
        r"Adam\(differentiable=True\) keeps its steps in the",
    ),
}


def trained(optimizer: Any) -> None:
    getattr(optimizer, "train", lambda: None)()


@pytest.mark.parametrize("name", ALONE)
def test_one_at_a_time_is_the_same(name: str) -> None:
    optimizer = ALONE[name](model().parameters())
    state = optimizer.state_dict()
    random = torch.get_rng_state()
    assert why_not_alone(optimizer) == ""
    assert str(optimizer.state_dict()) == str(state) and torch.equal(torch.get_rng_state(), random)
    assert_same(ALONE[name], trained)


@pytest.mark.parametrize("name", TOGETHER)
def test_what_looks_at_all_parameters_is_refused(name: str) -> None:
    make, reason = TOGETHER[name]
    module = model()
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(ValueError, match=f"steps each parameter by itself, but {reason}"):
        step_in_backward_(make(list(module.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))


def test_a_schedule_that_starts_at_zero_hides_nothing() -> None:
    optimizer = GlobalNorm(model().parameters(), 1e-3)
    LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    assert "something else" in why_not_alone(optimizer)


def test_the_closure_is_called_once() -> None:
    optimizer = step_in_backward_(Twice(model().parameters(), 1e-3))
    calls = []
    optimizer.step(lambda: calls.append(1))  # type: ignore[arg-type, return-value]
    assert calls == [1]


def test_what_fails_is_refused_with_the_error() -> None:
    class Fails(Lion):
        def step(self, closure: Any = None) -> Any:
            raise ZeroDivisionError("no closure")

    assert "(ZeroDivisionError: no closure)" in why_not_alone(Fails(model().parameters(), 1e-3))


def test_a_replaced_step_and_a_second_change_are_refused() -> None:
    optimizer = torch.optim.SGD(model().parameters())
    optimizer.step = print  # type: ignore[assignment, method-assign]
    assert "was replaced" in why_not_alone(optimizer)
    with pytest.raises(ValueError, match="this SGD does not"):
        step_in_backward_(step_in_backward_(torch.optim.SGD(model().parameters())))


def test_low_bit_and_muon_of_what_looks_at_all_parameters_are_refused_too() -> None:
    module = model()
    optimizer = quantize_optimizer_(GlobalNorm(module.parameters(), 1e-3), 256, moments={"average": True})
    assert "something else" in why_not_alone(optimizer)
    optimizer = use_muon_(GlobalNorm(module.parameters(), 1e-3), [module[0].weight])
    assert "something else" in why_not_alone(optimizer)
