"""Low-bit state of sharded parameters: what a state dict holds, and where it can be loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_accel.optimizers.layouts import plain_state_dict, torchao_parts
from lightning_accel.optimizers.low_bit_plan import local_part
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from lightning_accel.optimizers.torchao_state import use_torchao_


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


BACKENDS: dict[str, Any] = {
    "generic": quantize_optimizer_,
    "torchao": use_torchao_,
    "torchao in 4 bits": partial(use_torchao_, bits=4),
}


def trained(backend: str, mesh: Any = None, steps: int = 3) -> tuple[Any, nn.Parameter]:
    """AdamW with low-bit state after a few steps."""
    weight = nn.Parameter(torch.linspace(-1, 1, 2048).view(32, 64))
    if mesh is not None:
        weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    optimizer = BACKENDS[backend](torch.optim.AdamW([weight], lr=0.1), min_size=1)
    for _ in range(steps):
        step(optimizer, weight)
    return optimizer, weight


def step(optimizer: Any, weight: nn.Parameter) -> None:
    weight.grad = (weight.detach() * weight.detach()).clone()
    optimizer.step()


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value  # type: ignore[no-any-return]


def parts(moment: Any) -> dict[str, Any]:
    """The codes and scales of a moment, those of this rank."""
    return moment if isinstance(moment, dict) else torchao_parts(local_part(moment))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_step_as_the_whole_does_and_keep_codes(mesh: Any, backend: str) -> None:
    (sharded, weight), (_, plain) = trained(backend, mesh), trained(backend)
    assert torch.equal(whole(weight.detach()), plain.detach())
    assert parts(sharded.state[weight]["exp_avg"])["codes"].dtype.itemsize == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_dict_has_decoded_shards_and_goes_on_bit_for_bit(mesh: Any, backend: str) -> None:
    optimizer, weight = trained(backend, mesh)
    saved = optimizer.state_dict()
    assert type(saved["state"][0]["exp_avg"]) is DTensor and saved["state"][0]["exp_avg"].shape == (32, 64)
    assert type(local_part(saved["state"][0]["exp_avg"])) is torch.Tensor
    other, again = trained(backend, mesh, steps=1)
    other.load_state_dict(copy.deepcopy(saved))  # torch shares the count of steps
    with torch.no_grad():
        again.copy_(weight)
    for name in ("exp_avg", "exp_avg_sq"):
        ours, theirs = parts(other.state[again][name]), parts(optimizer.state[weight][name])
        assert torch.equal(ours["codes"], theirs["codes"])
    step(optimizer, weight)
    step(other, again)
    assert torch.equal(whole(weight.detach()), whole(again.detach()))


@pytest.mark.parametrize("source", BACKENDS)
@pytest.mark.parametrize("backend", ["generic", "torchao"])
def test_codes_that_were_saved_whole_are_split(mesh: Any, backend: str, source: str) -> None:
    saved = trained(source)[0].state_dict()
    optimizer, weight = trained(backend, mesh, steps=1)
    optimizer.load_state_dict(saved)
    found, expected = optimizer.state_dict()["state"][0], plain_state_dict(saved, optimizer)["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        assert type(found[name]) is DTensor
        error = (whole(found[name]) - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= (0.04 if source != backend else 0), name
    step(optimizer, weight)
