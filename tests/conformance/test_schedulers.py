"""Learning-rate schedulers step the optimizer that really runs, and count its steps right."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything

from tests.conformance.cases import SAMPLE, cases, wrong
from tests.conformance.toy import EPOCHS, Digits, make_scheduler, run
from tests.methods import METHODS, STACKS, Method

SCHEDULERS = ["LambdaLR", "OneCycleLR", "ReduceLROnPlateau", "SequentialLR"]


def expected_rates(name: str, steps_per_epoch: list[int]) -> list[float]:
    """The learning rate of each step, from a scheduler on an optimizer of its own."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = make_scheduler(name, optimizer, sum(steps_per_epoch))
    rates = []
    for steps in steps_per_epoch:
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if name != "ReduceLROnPlateau":
                scheduler.step()
        if name == "ReduceLROnPlateau":
            scheduler.step(1.0)
    return rates


def check_schedulers(method: Method, name: str) -> None:
    result = run(method.make(), partial(Digits, scheduler=name))
    scheduler = result.trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.optimizer is result.trainer.optimizers[0], "the scheduler has another optimizer than the Trainer"
    steps = [sum(at == epoch for at, _ in result.rates) for epoch in range(EPOCHS)]
    assert sum(steps) == result.trainer.global_step
    rates, expected = [rate for _, rate in result.rates], expected_rates(name, steps)
    if method.finds_rate:
        expected = [rate * rates[0] / expected[0] for rate in expected]
    assert rates == pytest.approx(expected, rel=1e-6), "the learning rates of the steps"


def check_rate_is_used(method: Method) -> None:
    """At a rate of 0 no weight moves (but to 0, where it is pruned)."""
    seed_everything(7, verbose=False)
    start = Digits().state_dict()
    weights = run(method.make(), partial(Digits, scheduler="off")).weights
    for name, _ in Digits().named_parameters():
        still = (weights[name] == start[name].to(weights[name])) | (weights[name] == 0)
        assert still.all(), f"{name} moves at a learning rate of 0"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("method", cases([*METHODS, STACKS[-1]], quick=SAMPLE))
def test_schedulers(method: Method, scheduler: str) -> None:
    check_schedulers(method, scheduler)


@pytest.mark.parametrize("method", cases([*METHODS, STACKS[-1]], quick=SAMPLE))
def test_rate_is_used(method: Method) -> None:
    check_rate_is_used(method)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_lost_scheduler_is_flagged(scheduler: str) -> None:
    with pytest.raises(AssertionError, match="another optimizer than the Trainer"):
        check_schedulers(wrong("LostScheduler"), scheduler)


def test_a_rate_that_is_not_used_is_flagged() -> None:
    with pytest.raises(AssertionError, match="moves at a learning rate of 0"):
        check_rate_is_used(wrong("LostRate"))


def test_a_wrong_number_of_steps_is_flagged() -> None:
    with pytest.raises(AssertionError, match="the learning rates of the steps"):
        check_schedulers(wrong("LostCount"), "OneCycleLR")
