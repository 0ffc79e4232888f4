"""The loops of :mod:`lightning_accel.optimizers.codes` on a CUDA device, and the step of Adam around them, in Triton.

Codes and decoded values are, to the bit, those of the tensor operations of that module; only the time differs. Triton
comes with torch's builds for CUDA on Linux. This module can't be imported without it, so `triton_for` of
:mod:`lightning_accel.optimizers.kernels` does.

A program works on a few blocks of a line, each a row of its tile. What is beyond the line's end counts as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_accel.optimizers.codes import CODES, LINES, LOWEST, OFFSET, table

__all__ = ["adam_step_", "decode", "encode"]

_NAMES: dict[int | str, int] = {8: 8, 4: 4, "fp8": 1, "bf16": 16}
"""What the kernels call the codes."""
_ROWS = 4
# a fused multiply-add would round once where two operations round twice
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}

_LOW_SIGNED, _LOW = tl.constexpr(LOWEST[True]), tl.constexpr(LOWEST[False])
_OFFSET_SIGNED, _OFFSET = tl.constexpr(OFFSET[True]), tl.constexpr(OFFSET[False])
_REST_SIGNED, _REST = tl.constexpr(1 - OFFSET[True]), tl.constexpr(1 - OFFSET[False])
_A0, _A1, _A2, _A3, _A4, _A5 = (tl.constexpr(slope) for slope, _ in LINES.tolist())
_B0, _B1, _B2, _B3, _B4, _B5 = (tl.constexpr(height) for _, height in LINES.tolist())
_UNIT = tl.constexpr(2.0**-20)
_SMALLEST = tl.constexpr(2.0**-6)


@triton.jit
def _read(codes, scales, values, rows, size, CODE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Decode a tile."""
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, is_row = places < size, rows * BLOCK < size
    if CODE == 16:
        bits = tl.load(codes + places, mask=inside, other=0).to(tl.int32) << 16
        x = bits.to(tl.float32, bitcast=True)
    else:
        if CODE == 4:
            halves = rows[:, None] * 64 + tl.arange(0, 64)[None, :]
            both = tl.load(codes + halves, mask=is_row[:, None], other=0).to(tl.int32)
            index = tl.reshape(tl.permute(tl.join(both & 15, both >> 4), (0, 2, 1)), [ROWS, BLOCK])
        else:
            index = tl.load(codes + places, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + rows, mask=is_row, other=0.0)
        x = tl.where(inside, tl.load(values + index) * scale[:, None], 0.0)
    return x


@triton.jit
def _write(
    x, codes, scales, noise, rows, size, tiny,
    CODE: tl.constexpr, SIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Encode a tile."""
    columns = tl.arange(0, BLOCK)
    places = rows[:, None] * BLOCK + columns[None, :]
    inside, is_row = places < size, rows * BLOCK < size
    raised = tl.broadcast_to(tl.load(noise + columns)[None, :], [ROWS, BLOCK])
    if CODE == 16:
        bits = x.to(tl.int32, bitcast=True) + (raised >> 4)
        tl.store(codes + places, (bits >> 16).to(tl.int16), mask=inside)
    else:
        magnitude = tl.abs(x)
        largest = tl.maximum(tl.max(magnitude, axis=1), tiny)
        has_nan = tl.max((x != x).to(tl.int32), axis=1) > 0  # which tl.max passes over
        scale = tl.where(has_nan, float("nan"), largest)
        ratio = tl.div_rn(magnitude, tl.broadcast_to(scale[:, None], [ROWS, BLOCK]))
        if CODE == 8:
            if SIGNED:
                bits = (ratio * _REST_SIGNED + _OFFSET_SIGNED).to(tl.int32, bitcast=True)
                bits = ((bits + raised) >> 20) - _LOW_SIGNED
                negative = x.to(tl.int32, bitcast=True) >> 31  # -1 or 0
                bits = (bits ^ negative) - negative
            else:
                bits = (ratio * _REST + _OFFSET).to(tl.int32, bitcast=True)
                bits = ((bits + raised) >> 20) - _LOW
                bits = tl.maximum(bits, (x > 0).to(tl.int32))
        elif CODE == 1:
            value = ratio * 448.0
            normal = tl.where(value < _SMALLEST, _SMALLEST, value)
            small = tl.where(value > _SMALLEST, _SMALLEST, value)
            bits = ((normal.to(tl.int32, bitcast=True) + raised) >> 20) - 968
            bits += (small * 512.0 + raised.to(tl.float32) * _UNIT).to(tl.int32)
            if not SIGNED:
                bits = tl.maximum(bits, (value > 0).to(tl.int32))
            bits += ((x < 0) & (bits > 0)).to(tl.int32) << 7
        else:
            if SIGNED:
                flip = -tl.min(x, axis=1) > tl.max(x, axis=1)
                scale = tl.where(flip, -scale, scale)
                place = ratio * _A0 + _B0
                place = tl.minimum(place, ratio * _A1 + _B1)
                place = tl.minimum(place, ratio * _A2 + _B2)
                place = tl.minimum(place, ratio * _A3 + _B3)
                place = tl.minimum(place, ratio * _A4 + _B4)
                place = tl.maximum(place, ratio * _A5 + _B5)
                negative = ((x < 0) ^ (tl.broadcast_to(flip[:, None], [ROWS, BLOCK]) & (x != 0))).to(tl.int32)
                index = tl.minimum((place + raised.to(tl.float32) * _UNIT).to(tl.int32), 8 - negative)
                index = tl.where(negative > 0, 7 - index, 7 + index)
            else:
                place = ratio * 16.0 - 1.0 + raised.to(tl.float32) * _UNIT
                index = tl.minimum(tl.maximum(place, 0.0).to(tl.int32), 15)
            low, high = tl.split(tl.permute(tl.reshape(index & 15, [ROWS, 2, 64]), (0, 2, 1)))
            halves = rows[:, None] * 64 + tl.arange(0, 64)[None, :]
            tl.store(codes + halves, (low | (high << 4)).to(tl.uint8), mask=is_row[:, None])
        if CODE != 4:
            tl.store(codes + places, (bits & 255).to(tl.uint8), mask=inside)
        tl.store(scales + rows, scale, mask=is_row)


@triton.jit
def _encode(
    line, codes, scales, noise, size, tiny,
    CODE: tl.constexpr, SIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(line + places, mask=places < size, other=0.0)
    _write(x, codes, scales, noise, rows, size, tiny, CODE, SIGNED, ROWS, BLOCK)


@triton.jit
def _decode(codes, scales, values, out, size, CODE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = _read(codes, scales, values, rows, size, CODE, ROWS, BLOCK)
    tl.store(out + places, x, mask=places < size)


@triton.jit
def _adam(
    weight, gradient, codes1, scales1, codes2, scales2, codes3, scales3, values1, values2, noise, size, tiny,
    beta1, rest1, beta2, rest2, eps, weight_decay, shrink, step_size, correction,
    CODE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = places < size
    w = tl.load(weight + places, mask=inside, other=0.0) * shrink
    g = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    g += weight_decay * w
    m = beta1 * _read(codes1, scales1, values1, rows, size, CODE, ROWS, BLOCK) + rest1 * g
    v = beta2 * _read(codes2, scales2, values2, rows, size, CODE, ROWS, BLOCK) + rest2 * g * g
    _write(m, codes1, scales1, noise, rows, size, tiny, CODE, True, ROWS, BLOCK)
    _write(v, codes2, scales2, noise, rows, size, tiny, CODE, False, ROWS, BLOCK)
    if AMSGRAD:
        most = _read(codes3, scales3, values2, rows, size, CODE, ROWS, BLOCK)
        v = tl.where((v > most) | (v != v), v, most)
        _write(v, codes3, scales3, noise, rows, size, tiny, CODE, False, ROWS, BLOCK)
    root = tl.div_rn(tl.sqrt_rn(v), tl.zeros([ROWS, BLOCK], tl.float32) + correction)
    tl.store(weight + places, w - step_size * tl.div_rn(m, root + eps), mask=inside)


def _raw(codes: Tensor) -> Tensor:
    return codes.view(torch.int16 if codes.dtype is torch.bfloat16 else torch.uint8)


def _block(bits: int | str) -> int:
    return CODES[bits].block or 256


def _grid(size: int, bits: int | str) -> tuple[int]:
    return (-(-size // (_ROWS * _block(bits))),)


def _values(bits: int | str, signed: bool, device: torch.device) -> Tensor:
    name = "fp8" if bits in ("fp8", "bf16") else f"{bits} {'signed' if signed else 'unsigned'}"
    return table(name, device)


def encode(line: Tensor, codes: Tensor, scales: Tensor, noise: Tensor, bits: int | str, signed: bool) -> None:
    """Encode a line of float32, as ``CODES[bits].encode`` does."""
    size, tiny = line.numel(), torch.finfo(torch.float32).tiny
    with torch.cuda.device_of(line):
        _encode[_grid(size, bits)](
            line, _raw(codes), scales, noise, size, tiny, _NAMES[bits], signed, _ROWS, _block(bits), **_OPTIONS
        )  # fmt: skip


def decode(codes: Tensor, scales: Tensor, out: Tensor, bits: int | str, signed: bool) -> None:
    """Decode into a line of float32, as ``CODES[bits].decode`` does."""
    size, values = out.numel(), _values(bits, signed, out.device)
    with torch.cuda.device_of(out):
        _decode[_grid(size, bits)](
            _raw(codes), scales, values, out, size, _NAMES[bits], _ROWS, _block(bits), **_OPTIONS
        )  # fmt: skip


def adam_step_(
    weight: Tensor,
    gradient: Tensor,
    moments: Sequence[tuple[Tensor, Tensor]],
    noise: Tensor,
    bits: int | str,
    step: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """One step of Adam or AdamW on a line of weights, in place.

    Args:
        weight: In float32.
        gradient: In any floating-point dtype.
        moments: Codes and scales of the first and the second moment, and with ``amsgrad`` of the largest second one.
        noise: As :func:`lightning_accel.optimizers.codes.dither` makes it.
        bits: Of all moments.
        step: The number of this step, from 1.
        lr: As of torch's optimizers, as are those below.
        betas: Likewise.
        eps: Likewise.
        weight_decay: Likewise.
        decoupled: Whether weight decay is that of AdamW.
        maximize: Likewise.
    """
    parts = [part for codes, scales in moments for part in (_raw(codes), scales)]
    parts += parts[2:] if len(moments) == 2 else []  # not read
    tables = [_values(bits, signed, weight.device) for signed in (True, False)]
    numbers = [betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps]
    numbers += [0.0, 1 - lr * weight_decay] if decoupled else [weight_decay, 1.0]
    numbers += [lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5]
    size, tiny = weight.numel(), torch.finfo(torch.float32).tiny
    with torch.cuda.device_of(weight):
        _adam[_grid(size, bits)](
            weight, gradient, *parts, *tables, noise, size, tiny, *map(float, numbers),
            _NAMES[bits], len(moments) == 3, maximize, _ROWS, _block(bits), **_OPTIONS,
        )  # fmt: skip
