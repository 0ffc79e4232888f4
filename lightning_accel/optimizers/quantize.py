"""Blockwise 8-bit codes for optimizer state, in plain torch.

A tensor is cut into blocks of 256 elements, in the order in which they lie in memory. Each block keeps its largest
magnitude, and each element one byte: a small float (3 bits of mantissa) of its ratio to that largest magnitude. That is
1.016 bytes an element instead of 4. The idea of blocks and of a code finer near zero is that of "8-bit Optimizers via
Block-wise Quantization" (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861); the code itself is chosen so that

- encoding is a handful of integer operations on the bits of a float32, with no search in a table;
- zero is code 0, and only zero is exactly zero in the unsigned code, so that no update is divided by a second moment
  that was rounded away; the smallest first moment (2.1e-6 of the block's largest) is below the root of the smallest
  second moment (2.9e-11), so that a moment that is rounded up cannot become an outsized Adam update;
- rounding is unbiased: whether an element is rounded up or down depends on its position and the step by a sequence that
  fills [0, 1) evenly. Rounding to the nearest would freeze a moving average with a decay of 0.999, whose steps are far
  smaller than the distance between two codes. No random numbers are drawn, so a resumed run repeats it bit for bit.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["BLOCK", "dequantize_blockwise", "quantize_blockwise"]

BLOCK = 256
"""Elements that share one scale."""

_SHIFT = 20  # of the 23 mantissa bits of a float32, 3 are kept
_ONE = 0x3F800000  # the bits of 1.0
# A ratio r in [0, 1] is coded as the top bits of offset + r * (1 - offset), which lies in [offset, 1]: near zero the
# steps are even, above that they grow with the value. The offset is such that the codes are exactly 0 ... 127 or 255.
_LOWEST = {torch.int8: (_ONE >> _SHIFT) - 127, torch.uint8: (_ONE >> _SHIFT) - 255}
_OFFSET = {torch.int8: 9 * 2.0**-19, torch.uint8: 9 * 2.0**-35}
_CPU_CHUNK = 2**16  # elements at a time, so that the intermediate results stay in the processor's cache


@torch.no_grad()
def quantize_blockwise(
    tensor: Tensor, signed: bool, step: int | None = 0, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Encode a floating-point tensor in one byte an element.

    Args:
        tensor: Of any shape and memory layout.
        signed: Whether it may be negative. An unsigned code has twice the exponents and never turns a positive value
            into zero.
        step: Selects how values between two codes are rounded; over consecutive steps they average to the value.
            ``None`` rounds to the nearest, which gives decoded values the codes that they came from.
        out: Codes and scales of an earlier call to overwrite, where they fit.

    Returns:
        The codes, ``int8`` if signed and ``uint8`` if not, in the shape and layout of ``tensor``; and the scales, one a
        block, in its dtype. A block that is not finite comes back as NaN.
    """
    dtype = torch.int8 if signed else torch.uint8
    codes = torch.empty_like(tensor, dtype=dtype)
    if codes.stride() != tensor.stride():  # not dense: its elements can't be read as one line
        tensor = tensor.contiguous()
        codes = torch.empty_like(tensor, dtype=dtype)
    size = tensor.numel()
    scales = tensor.new_empty(-(-size // BLOCK))
    if out is not None and all(_alike(old, new) for old, new in zip(out, (codes, scales), strict=True)):
        codes, scales = out
    line, code_line = _line(tensor), _line(codes)
    widest = torch.promote_types(tensor.dtype, torch.float32)
    lowest, offset = _LOWEST[dtype], _OFFSET[dtype]
    noise = _rounding(step, tensor.device)
    chunk = _CPU_CHUNK if tensor.device.type == "cpu" else max(size, 1)
    for start in range(0, size, chunk):
        part = line[start : start + chunk]
        length = part.numel()
        if length % BLOCK:
            part = torch.nn.functional.pad(part, (0, -length % BLOCK))
        blocks = part.view(-1, BLOCK)
        ratio = blocks.abs() if signed else blocks
        # a scale below the smallest normal number would not survive the division
        scale = ratio.amax(dim=1).clamp_min_(torch.finfo(tensor.dtype).tiny)
        scales[start // BLOCK : (start + length + BLOCK - 1) // BLOCK] = scale
        ratio = torch.div(ratio.to(widest), scale[:, None]).float().mul_(1 - offset).add_(offset)
        bits = ratio.view(torch.int32).add_(noise).bitwise_right_shift_(_SHIFT).sub_(lowest)
        if signed:
            negative = blocks.float().view(torch.int32) >> 31  # -1 or 0: flipping all bits and adding 1 negates
            bits.bitwise_xor_(negative).sub_(negative)
        else:
            torch.maximum(bits, (blocks > 0).to(torch.int32), out=bits)
        code_line[start : start + length] = bits.view(-1)[:length]
    return codes, scales


@torch.no_grad()
def dequantize_blockwise(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode what :func:`quantize_blockwise` returned, to its shape, layout and dtype."""
    result = torch.empty_like(codes, dtype=scales.dtype)
    line, code_line = _line(result), _line(codes.view(torch.uint8))
    values = _values(codes.dtype, codes.device)
    chunk = _CPU_CHUNK if codes.device.type == "cpu" else max(codes.numel(), 1)
    for start in range(0, line.numel(), chunk):
        part = code_line[start : start + chunk]
        length = part.numel()
        if length % BLOCK:
            part = torch.nn.functional.pad(part, (0, -length % BLOCK))
        decoded = values.index_select(0, part.to(torch.int32)).view(-1, BLOCK)
        scale = scales[start // BLOCK : (start + length + BLOCK - 1) // BLOCK]
        line[start : start + length] = (decoded * scale[:, None]).view(-1)[:length]
    return result


def _line(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _alike(old: Tensor, new: Tensor) -> bool:
    return (old.shape, old.stride(), old.dtype, old.device) == (new.shape, new.stride(), new.dtype, new.device)


@functools.lru_cache(maxsize=4)
def _rounding(step: int | None, device: torch.device) -> Tensor:
    """For each position in a block, how far the bits of a value are raised before the lowest are cut off."""
    if step is None:
        return torch.full((BLOCK,), 2 ** (_SHIFT - 1), dtype=torch.int32, device=device)
    position = torch.arange(BLOCK, dtype=torch.float64)
    # multiples of two irrational numbers: evenly spread over [0, 1), along the block and along the steps
    fraction = (position * 0.6180339887498949 + step * 0.4142135623730951) % 1.0
    return (fraction * float(2**_SHIFT)).to(device, torch.int32)


@functools.lru_cache(maxsize=8)
def _values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each byte stands for, as a ratio to the block's scale; for ``int8`` in the order of its bytes."""
    magnitude = torch.arange(128 if dtype is torch.int8 else 256, dtype=torch.int32)
    bits = magnitude.add_(_LOWEST[dtype]).bitwise_left_shift_(_SHIFT)
    values = bits.view(torch.float32).sub(_OFFSET[dtype]).div_(1 - _OFFSET[dtype])
    if dtype is torch.int8:  # byte 128 is never used; 129 ... 255 are -127 ... -1
        values = torch.cat([values, -values[-1:], -values[1:].flip(0)])
    return values.to(device)
