"""The kernels in Triton code to the bit what tensor operations code, and step as the CPU does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_accel.optimizers import kernels
from lightning_accel.optimizers.codes import CODES
from lightning_accel.optimizers.quantize import decode_moment, encode_moment
from lightning_accel.optimizers.quantized_state import quantize_optimizer_

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
DEVICE = torch.device("cuda", 0)


def test_they_are_used() -> None:
    assert kernels.triton_on(DEVICE) is not None


def odd(size: int, signed: bool) -> Tensor:
    """Magnitudes far apart, a block that is nearly nothing, zeros of both signs."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator) * torch.exp(3 * torch.randn(size, generator=generator))
    if size > 256:
        x[5:20], x[64], x[128:256] = 0, -0.0, x[128:256] * 1e-42
    return (x if signed else x.abs()).to(DEVICE)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", CODES)
def test_codes_and_values_are_those_of_tensor_operations(
    bits: Any, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (1, 100, 128, 129, 1000, 4173, 70_001):
        for step in (None, 0, 1, 12345):
            x = odd(size, signed)
            monkeypatch.setattr(kernels, "without_kernels", False)
            ours = encode_moment(x, signed, step, bits=bits)
            ours_decoded = decode_moment(ours)
            monkeypatch.setattr(kernels, "without_kernels", True)
            plain = encode_moment(x, signed, step, bits=bits)
            for name in ("codes", "scales"):
                assert torch.equal(ours[name].view(torch.uint8), plain[name].view(torch.uint8)), (size, step, name)
            assert torch.equal(ours_decoded, decode_moment(plain))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", CODES)
def test_a_block_that_is_not_finite_stays_so(bits: Any, value: float) -> None:
    x = torch.ones(600, device=DEVICE)
    x[300] = value
    decoded = decode_moment(encode_moment(x, True, 3, bits=bits))
    block = CODES[bits].block or 1
    assert not decoded[300].isfinite()
    assert decoded[: 300 // block * block].isfinite().all() and decoded[-20:].isfinite().all()


MAKE: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "Adam L2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "Adam amsgrad maximize": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, maximize=True),
}


def steps(make: Any, bits: Any, device: Any, count: int = 8) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(37, 71, generator=generator).to(device))
    optimizer: Any = quantize_optimizer_(make([weight]), bits=bits, min_size=1)
    for step in range(count):
        weight.grad = (torch.randn(37, 71, generator=generator) * (1 + step)).to(device)
        optimizer.step()
    return weight.detach().cpu(), optimizer.state[weight]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("bits", CODES)
def test_the_step_is_that_of_the_cpu(name: str, bits: Any) -> None:
    ours, state = steps(MAKE[name], bits, DEVICE)
    expected, cpu_state = steps(MAKE[name], bits, "cpu")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert state.keys() == cpu_state.keys() and float(state["step"]) == float(cpu_state["step"]) == 8
    for key, moment in cpu_state.items():
        if isinstance(moment, dict):
            same = state[key]["codes"].cpu().view(torch.uint8) == moment["codes"].view(torch.uint8)
            assert same.float().mean() > 0.99, key


def test_bfloat16_weights_are_rounded_at_random_from_the_same_step() -> None:
    weight = torch.nn.Parameter(torch.ones(1000, 100, dtype=torch.bfloat16, device=DEVICE))
    optimizer = quantize_optimizer_(torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0), seed=3)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert set(weight.unique().tolist()) == {1.0, 1.0 - 2**-8}
    assert weight.detach().double().mean().item() == pytest.approx(0.999, abs=2e-5)
