from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_accel.optimizers.quantize import BLOCK, dequantize_blockwise, quantize_blockwise

SIGNED = [True, False]


def sample(*shape: int, signed: bool) -> torch.Tensor:
    value = torch.randn(*shape) * torch.randn(*shape).exp()
    return value if signed else value.square()


@pytest.mark.parametrize("signed", SIGNED)
def test_a_value_becomes_one_of_the_two_codes_around_it(signed: bool) -> None:
    codes = torch.arange(-127 if signed else 0, 128 if signed else 256)
    codes = torch.nn.functional.pad(codes, (0, BLOCK - len(codes))).to(torch.int8 if signed else torch.uint8)
    table = dequantize_blockwise(codes, torch.ones(1))
    assert table[127 if signed else 0] == 0 and table.max() == 1
    assert (table[: 255 if signed else 256].diff() > 0).all()
    value = sample(4 * BLOCK, signed=signed)
    scale = value.abs().view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    decoded = dequantize_blockwise(*quantize_blockwise(value, signed))
    table = table[: 255 if signed else 256].contiguous()
    above = torch.searchsorted(table, value / scale).clamp(max=len(table) - 1)
    around = torch.stack([table[above - 1], table[above]]) * scale
    assert torch.isclose(decoded, around, rtol=1e-5).any(dim=0).all()


@pytest.mark.parametrize("signed", SIGNED)
def test_error_is_an_eighth_at_most_and_the_largest_is_exact(signed: bool) -> None:
    value = sample(64, BLOCK, signed=signed)
    decoded = dequantize_blockwise(*quantize_blockwise(value, signed, step=3))
    largest = value.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(decoded.gather(1, largest), value.gather(1, largest))
    large = value.abs() > 1e-3 * value.abs().amax(dim=1, keepdim=True)
    assert (((decoded - value) / value).abs()[large] <= 1 / 8 + 1e-6).all()


@pytest.mark.parametrize("signed", SIGNED)
def test_decoded_values_encode_to_themselves_at_any_step(signed: bool) -> None:
    codes, scales = quantize_blockwise(sample(7, 100, signed=signed), signed, step=1)
    again, scales_again = quantize_blockwise(dequantize_blockwise(codes, scales), signed, step=8)
    assert torch.equal(codes, again) and torch.equal(scales, scales_again)


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("factor", [1.0, 3.3e-12])
def test_rounded_to_the_nearest_decoded_values_get_their_own_codes(signed: bool, factor: float) -> None:
    value = torch.randn(256 * 256, generator=torch.Generator().manual_seed(0))
    value = factor * value * value.abs() ** 5 if signed else factor * value.abs() ** 9
    for step in range(4):
        codes, scales = quantize_blockwise(value, signed, step)
        again, scales_again = quantize_blockwise(dequantize_blockwise(codes, scales), signed, None)
        assert torch.equal(codes, again) and torch.equal(scales, scales_again)
    nearest = dequantize_blockwise(*quantize_blockwise(value, signed, None))
    assert (nearest - value).abs().sum() < 0.8 * (dequantize_blockwise(codes, scales) - value).abs().sum()


@pytest.mark.parametrize("signed", SIGNED)
def test_rounding_averages_to_the_value_over_the_steps(signed: bool) -> None:
    value = sample(8 * BLOCK, signed=signed)
    value[::5] *= 1e-3
    steps = range(100, 356)
    mean = torch.stack([dequantize_blockwise(*quantize_blockwise(value, signed, step)) for step in steps]).mean(0)
    scale = value.abs().view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    # the unsigned code never rounds down to zero, so its smallest values may come out larger
    assert (((mean - value).abs() / (value.abs() + 1e-6 * scale)).median() < 1e-3) and (mean - value).abs().max() < (
        0.01 * scale.max()
    )
    nearest = dequantize_blockwise(*quantize_blockwise(value, signed, 100))
    assert (mean - value).norm() < 0.05 * (nearest - value).norm()


def test_a_moving_average_with_slow_decay_follows_its_input() -> None:
    exact, coded = torch.ones(BLOCK), torch.ones(BLOCK)
    coded[0] = exact[0] = 10.0  # keeps the scale
    target = torch.full((BLOCK,), 0.3)
    target[0] = 10.0
    for step in range(1500):
        exact = exact * 0.999 + target * 0.001
        coded = dequantize_blockwise(*quantize_blockwise(coded * 0.999 + target * 0.001, False, step))
    # rounded to the nearest it would stand still at 1, more than twice too large
    assert (coded[1:].mean() / exact[1:].mean()).item() == pytest.approx(1, abs=0.1)


def test_zero_stays_zero_and_no_second_moment_becomes_zero() -> None:
    value = torch.zeros(2 * BLOCK)
    value[0], value[1], value[2] = 1.0, 1e-30, 1e-38
    for step in range(20):
        decoded = dequantize_blockwise(*quantize_blockwise(value, False, step))
        assert torch.equal(decoded == 0, value == 0)
        signed = dequantize_blockwise(*quantize_blockwise(-value, True, step))
        assert (signed[3:] == 0).all() and (signed <= 0).all()


def test_the_smallest_first_moment_is_below_the_root_of_the_smallest_second_moment() -> None:
    first = dequantize_blockwise(torch.ones(1, dtype=torch.int8), torch.ones(1)).item()
    second = dequantize_blockwise(torch.ones(1, dtype=torch.uint8), torch.ones(1)).item()
    assert 0 < first < math.sqrt(second)


@given(st.integers(0, 3 * BLOCK), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_any_size_and_dtype(size: int, dtype: torch.dtype) -> None:
    value = torch.randn(size, dtype=torch.float64).to(dtype)
    codes, scales = quantize_blockwise(value, True)
    assert codes.shape == value.shape and scales.shape == (math.ceil(size / BLOCK),)
    decoded = dequantize_blockwise(codes, scales)
    assert decoded.dtype == dtype and decoded.shape == value.shape
    assert torch.allclose(decoded.double(), value.double(), rtol=0.14, atol=1e-4)


def test_layout_is_kept_and_memory_is_used_again() -> None:
    value = torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last)
    codes, scales = quantize_blockwise(value, True)
    assert codes.stride() == value.stride() == dequantize_blockwise(codes, scales).stride()
    again, _ = quantize_blockwise(value * 2, True, out=(codes, scales))
    assert again.data_ptr() == codes.data_ptr()
    assert torch.allclose(dequantize_blockwise(again, scales), 2 * value, rtol=0.14, atol=1e-4)
    gaps = torch.randn(40, 40)[:, ::2]  # not dense
    assert torch.allclose(dequantize_blockwise(*quantize_blockwise(gaps, True)), gaps, rtol=0.14, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("signed", SIGNED)
def test_what_is_not_finite_is_seen(bad: float, signed: bool) -> None:
    value = torch.ones(2 * BLOCK)
    value[5] = bad
    decoded = dequantize_blockwise(*quantize_blockwise(value, signed))
    assert not decoded[:BLOCK].isfinite().any() and (decoded[BLOCK:] == 1).all()


def test_tiny_values_are_not_lost_to_underflow() -> None:
    value = torch.full((BLOCK,), 1e-37)
    assert torch.allclose(dequantize_blockwise(*quantize_blockwise(value, False)), value, rtol=1e-3)


def test_size_is_one_byte_and_a_scale_a_block() -> None:
    codes, scales = quantize_blockwise(torch.randn(1024, 256), True)
    assert (codes.nbytes + scales.nbytes) / 2**18 == 1 + 4 / BLOCK
