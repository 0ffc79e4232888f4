"""State that no step has filled against the bytes of a real step: any optimizer, and both backends of 8-bit state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_accel import FusedOptimizer, LowBitOptimizer
from lightning_accel.report.sizes import optimizer_state_bytes
from lightning_accel.tuning.fake import fake_module_
from lightning_accel.tuning.optimizer_state import measure_flat_state, measure_state

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW, amsgrad": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, centered=True, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
}


class Net(nn.Module):
    """Two layers of the same shapes, a frozen one, and one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.frozen = nn.Linear(300, 700), nn.Linear(300, 700), nn.Linear(300, 700)
        self.embedding, self.head = nn.Embedding(50, 300), nn.Linear(300, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    parameters = list(net.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0}]


def fake_net(mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    with torch.device("meta"):
        net = Net()
    fake_module_(net, mode, dtype)
    return net


def real_bytes(optimizer: Optimizer) -> int:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    return optimizer_state_bytes([optimizer])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_any_optimizer(name: str) -> None:
    real = OPTIMIZERS[name](groups(Net()))
    mode = FakeTensorMode()
    fake = OPTIMIZERS[name](groups(fake_net(mode)))
    before = [list(group["params"]) for group in fake.param_groups]
    # Adagrad has a sum for frozen parameters too, which no step uses
    frozen = 4 * (300 * 700 + 700) if name == "Adagrad" else 0
    assert measure_state(fake, mode) == pytest.approx(real_bytes(real) - frozen, rel=1e-3)
    assert [group["params"] for group in fake.param_groups] == before and not any(
        parameter.grad is not None for group in before for parameter in group
    )


def test_an_optimizer_that_reads_values_is_stepped_on_small_real_parameters() -> None:
    class Looks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                assert all(float(parameter.grad.sum()) > 0 for parameter in group["params"] if parameter.requires_grad)
            return super().step(closure)

    def make(parameters: Any) -> Optimizer:
        return Looks(parameters, 0.1, momentum=0.9)

    mode = FakeTensorMode()
    assert measure_state(make(groups(fake_net(mode))), mode) == real_bytes(make(groups(Net())))


def test_state_that_is_made_at_construction() -> None:
    class Eager(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter] = {"sum": torch.zeros_like(parameter), "step": torch.zeros(())}

        def step(self, closure: Any = None) -> Any:
            for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
                if parameter.grad is not None:
                    assert float(parameter.grad.sum()) > 0  # so that it is stepped on small real ones
                    self.state[parameter]["sum"] += parameter.grad
                    self.state[parameter]["step"] += 1

    mode = FakeTensorMode()
    with mode:
        fake = Eager(groups(fake_net(mode)))
    frozen = 4 * (300 * 700 + 700 + 2)
    assert measure_state(fake, mode) == pytest.approx(real_bytes(Eager(groups(Net()))) - frozen, rel=1e-3)


def test_what_one_step_does_not_show_is_refused() -> None:
    mode = FakeTensorMode()
    with pytest.raises(ValueError, match="LBFGS keeps a history"):
        measure_state(torch.optim.LBFGS(fake_net(mode).parameters()), mode)
    with pytest.raises(ValueError, match="one step of SparseAdam fails"):
        measure_state(torch.optim.SparseAdam(fake_net(mode).parameters()), mode)


def test_state_of_flat_partitions_is_in_fp32_and_has_no_rows() -> None:
    mode = FakeTensorMode()
    net = fake_net(mode, torch.bfloat16)
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    for name, bytes_an_element in {"Adam": 8, "momentum": 4, "Adafactor": 4, "Adagrad": 4, "SGD": 0}.items():
        found = measure_flat_state(OPTIMIZERS[name](groups(net)), mode)
        assert found == pytest.approx(bytes_an_element * trained, abs=100), name


def test_an_optimizer_of_matrices_has_no_flat_state() -> None:
    class OfMatrices(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if any(parameter.dim() != 2 for group in self.param_groups for parameter in group["params"]):
                raise ValueError("only matrices")
            return super().step(closure)

    mode = FakeTensorMode()
    net = fake_net(mode)
    optimizer = OfMatrices([net.one.weight, net.two.weight], 0.1, momentum=0.9)
    assert measure_state(optimizer, mode) == 2 * 4 * 300 * 700
    assert measure_flat_state(optimizer, mode) is None


@pytest.mark.parametrize("backend", ["generic", "bitsandbytes"])
@pytest.mark.parametrize(
    "options", [{}, {"keep_32bit": ["embedding", "one"]}, {"min_size": 100_000}, {"min_size": 2000}], ids=str
)
def test_8_bit_state(backend: Any, options: dict[str, Any]) -> None:
    if backend == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    mode, real = FakeTensorMode(), Net()
    fake = fake_net(mode)

    def make(net: nn.Module) -> Optimizer:
        optimizer = torch.optim.AdamW(groups(net))
        return LowBitOptimizer(backend=backend, **options).transform(optimizer, net)

    found, expected = measure_state(make(fake), mode), real_bytes(make(real))  # nothing fake is left for the real one
    assert found == pytest.approx(expected, rel=0.02)
    assert expected < 0.7 * 8 * sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 4, "bits_for": {"one": 8, "odd": 8}}], ids=str)
def test_state_of_torchao_which_is_coded_in_whole_blocks(options: dict[str, Any]) -> None:
    pytest.importorskip("torchao")
    found = []
    mode = FakeTensorMode()
    for fake in (True, False):
        with torch.device("meta" if fake else "cpu"):
            net = nn.ModuleDict({"one": nn.Linear(320, 768), "two": nn.Linear(320, 768), "odd": nn.Linear(301, 700)})
        if fake:
            fake_module_(net, mode)
        optimizer = LowBitOptimizer(backend="torchao", **options).transform(torch.optim.AdamW(net.parameters()), net)
        found.append(measure_state(optimizer, mode) if fake else real_bytes(optimizer))
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_a_fused_optimizer_is_measured_as_any() -> None:
    mode = FakeTensorMode()
    net = fake_net(mode)
    optimizer = FusedOptimizer().transform(torch.optim.AdamW(groups(net)), net)
    assert measure_state(optimizer, mode) == pytest.approx(real_bytes(torch.optim.AdamW(groups(Net()))), rel=1e-3)


def test_an_expression_that_matches_nothing_is_refused_here_too() -> None:
    net = fake_net(FakeTensorMode())
    with pytest.raises((ValueError, MisconfigurationException), match="no_such"):
        LowBitOptimizer(keep_32bit=["no_such"]).transform(torch.optim.AdamW(net.parameters()), net)
