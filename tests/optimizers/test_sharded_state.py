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

from lightning_accel.optimizers.bitsandbytes_state import use_bitsandbytes_
from lightning_accel.optimizers.layouts import plain_state_dict
from lightning_accel.optimizers.quantized_state import quantize_optimizer_
from lightning_accel.optimizers.torchao_state import use_torchao_


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def trained(mesh: Any = None, steps: int = 3, use: Any = quantize_optimizer_) -> tuple[Any, nn.Parameter]:
    """AdamW with low-bit state after a few steps."""
    weight = nn.Parameter(torch.linspace(-1, 1, 2048).view(32, 64))
    if mesh is not None:
        weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    optimizer = use(torch.optim.AdamW([weight], lr=0.1), min_size=1)
    for _ in range(steps):
        step(optimizer, weight)
    return optimizer, weight


def step(optimizer: Any, weight: nn.Parameter) -> None:
    weight.grad = (weight.detach() * weight.detach()).clone()
    optimizer.step()


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value  # type: ignore[no-any-return]


def test_shards_step_as_the_whole_does_and_keep_codes(mesh: Any) -> None:
    (sharded, weight), (_, plain) = trained(mesh), trained()
    assert torch.equal(whole(weight.detach()), plain.detach())
    assert sharded.state[weight]["exp_avg"]["codes"].dtype == torch.int8


def test_a_state_dict_has_decoded_shards_and_goes_on_bit_for_bit(mesh: Any) -> None:
    optimizer, weight = trained(mesh)
    saved = optimizer.state_dict()
    assert isinstance(saved["state"][0]["exp_avg"], DTensor) and saved["state"][0]["exp_avg"].shape == (32, 64)
    other, again = trained(mesh, steps=1)
    other.load_state_dict(copy.deepcopy(saved))  # torch shares the count of steps
    with torch.no_grad():
        again.copy_(weight)
    for name in ("exp_avg", "exp_avg_sq"):
        for part in ("codes", "scales"):
            assert torch.equal(other.state[again][name][part], optimizer.state[weight][name][part])
    step(optimizer, weight)
    step(other, again)
    assert torch.equal(whole(weight.detach()), whole(again.detach()))


@pytest.mark.parametrize("use", [quantize_optimizer_, use_torchao_, use_bitsandbytes_])
def test_codes_that_were_saved_whole_are_split(mesh: Any, use: Any) -> None:
    saved = trained(use=use)[0].state_dict()
    optimizer, weight = trained(mesh, steps=1)
    optimizer.load_state_dict(saved)
    found, expected = optimizer.state_dict()["state"][0], plain_state_dict(saved, optimizer)["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        assert isinstance(found[name], DTensor)
        error = (whole(found[name]) - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= (0 if use is quantize_optimizer_ else 0.04), name
    step(optimizer, weight)
    optimizer, weight = trained(mesh, steps=1, use=partial(quantize_optimizer_, bits=32))
    optimizer.load_state_dict(saved)
    assert all(isinstance(optimizer.state[weight][name], DTensor) for name in ("exp_avg", "exp_avg_sq"))
    step(optimizer, weight)


def test_libraries_refuse_shards(mesh: Any) -> None:
    with pytest.raises(ValueError, match="torchao codes a decoded moment otherwise"):
        trained(mesh, use=use_torchao_)
