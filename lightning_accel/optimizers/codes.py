"""Codes of 8 and 4 bits, fp8 and bfloat16 for the elements of a line, in plain torch or by kernels in C or Triton.

A line is cut into blocks that share one scale, the block's largest magnitude, and each element is coded as its ratio to
it. The idea of blocks is that of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al. 2022,
https://arxiv.org/abs/2110.02861). What all codes have in common:

- Rounding is unbiased: whether an element is rounded up or down depends on its position and the step by a sequence that
  fills [0, 1) evenly. Rounding to the nearest would freeze a moving average with a decay of 0.999, whose steps are far
  smaller than the distance between two codes. No random numbers are drawn, so a resumed run repeats it bit for bit.
- A positive second moment never becomes zero, since an update is divided by its root.
- Rounded to the nearest, a decoded value gets the code that it came from.

The codes:

- 8: a small float with 3 bits of mantissa, in blocks of 256. Encoding is a handful of operations on the bits of a
  float32. The smallest first moment (2.1e-6 of the largest) is below the root of the smallest second moment (2.9e-11).
- 4: "Memory Efficient Optimizers with 4-bit States" (Li, Chen, Zhu 2023, https://arxiv.org/abs/2309.01507), in blocks
  of 128: the dynamic-exponent map for signed moments, and 1/16, 2/16 ... 16/16, without zero, for unsigned ones. A
  block's scale has the sign of its largest element, which is therefore exact; the map has +1 and no -1.
- "fp8": float8_e4m3fn in blocks of 256.
- "bf16": bfloat16, without scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_accel.optimizers.kernels import address, kernels, triton_for

__all__ = ["CODES", "LINES", "LOWEST", "OFFSET", "Code", "dither", "table"]

_SHIFT = 20  # of the 23 mantissa bits of a float32, 3 are kept
_ONE = 0x3F800000  # the bits of 1.0
# A ratio r in [0, 1] is coded as the top bits of offset + r * (1 - offset), which lies in [offset, 1]: near zero the
# steps are even, above that they grow with the value. The offset is such that the codes are exactly 0 ... 127 or 255.
LOWEST = {True: (_ONE >> _SHIFT) - 127, False: (_ONE >> _SHIFT) - 255}
OFFSET = {True: 9 * 2.0**-19, False: 9 * 2.0**-35}
_FP8_MAX = 448.0
_MAP = (0.0, 0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0)
"""The magnitudes of the signed 4-bit map; the negative half ends before 1."""


def _map_lines() -> Tensor:
    """The place of a magnitude in the map is the least of five lines, and from 0.8875 on a sixth."""
    lines = []
    for index in (0, 1, 2, 3, 4, 7):
        slope = 1 / (_MAP[index + 1] - _MAP[index])
        lines.append([slope, index - slope * _MAP[index]])
    return torch.tensor(lines, dtype=torch.float32)


LINES = _map_lines()
"""A slope and a height for each."""


@functools.lru_cache(maxsize=4)
def dither(step: int | None, device: torch.device) -> Tensor:
    """For each position in a block, by how many 2**-20 of the distance to the next code a value is raised.

    ``None`` rounds to the nearest. The ends of (0, 1) are left out by more than an operation's rounding.
    """
    if step is None:
        return torch.full((256,), 2 ** (_SHIFT - 1), dtype=torch.int32, device=device)
    position = torch.arange(256, dtype=torch.float64)
    # multiples of two irrational numbers: evenly spread over [0, 1), along the block and along the steps
    fraction = (position * 0.6180339887498949 + step * 0.4142135623730951) % 1.0
    return (fraction * float(2**_SHIFT - 32) + 16).to(device, torch.int32)


@functools.lru_cache(maxsize=16)
def table(kind: str, device: torch.device) -> Tensor:
    """What each code stands for, as a ratio to the block's scale, in the order of unsigned bytes."""
    if kind == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / _FP8_MAX
    elif kind == "4 unsigned":
        values = torch.arange(1, 17) / 16
    elif kind == "4 signed":
        magnitude = torch.tensor(_MAP)
        values = torch.cat([-magnitude[1:8].flip(0), magnitude])
    else:
        signed = kind == "8 signed"
        bits = torch.arange(128 if signed else 256, dtype=torch.int32).add_(LOWEST[signed])
        values = bits.bitwise_left_shift_(_SHIFT).view(torch.float32)
        values = values.sub(OFFSET[signed]).div_(1 - OFFSET[signed])
        if signed:  # byte 128 is never used; 129 ... 255 are -127 ... -1
            values = torch.cat([values, -values[-1:], -values[1:].flip(0)])
    return values.to(device, torch.float32)


@dataclass(frozen=True)
class Code:
    """One way to code the elements of a line; see the module.

    Attributes:
        name: As in ``bits``.
        block: Elements that share a scale; 0 where there are none.
        per_byte: Elements a byte of codes, or 0 where an element takes more.
        encode_plain: What :meth:`encode` does where there is no Triton.
        decode_plain: What :meth:`decode` does there.
    """

    name: int | str
    block: int
    per_byte: int
    encode_plain: Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]
    decode_plain: Callable[[Tensor, Tensor, Tensor], None]

    def encode(self, line: Tensor, codes: Tensor, scales: Tensor, noise: Tensor, signed: bool) -> None:
        """Write the codes and the scales of a line, with its dither; ``signed`` where it may be negative."""
        if (triton := triton_for(line, scales)) is not None:
            triton.encode(line, codes, scales, noise, self.name, signed)
        else:
            self.encode_plain(line, codes, scales, noise, signed)

    def decode(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """Write the line that codes and scales stand for."""
        # without scales it is a copy, for which torch has a kernel
        if self.block and (triton := triton_for(out, scales)) is not None:
            triton.decode(codes, scales, out, self.name, codes.dtype is torch.int8)
        else:
            self.decode_plain(codes, scales, out)

    def dtype(self, signed: bool) -> torch.dtype:
        """Of the codes; it tells the code and, but for fp8 and bfloat16, the sign."""
        if self.name == "bf16":
            return torch.bfloat16
        return torch.float8_e4m3fn if self.name == "fp8" else torch.int8 if signed else torch.uint8

    def num_scales(self, size: int) -> int:
        """Blocks of a line."""
        return -(-size // self.block) if self.block else 0


def _compiled(*tensors: Tensor) -> Any:
    """The kernels in C, where they can take these tensors."""
    return kernels() if all(t.device.type == "cpu" and t.dtype is torch.float32 for t in tensors) else None


def _blocks(line: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(line, (0, -line.numel() % block)).view(-1, block)


def _scaled(blocks: Tensor, scales: Tensor) -> Tensor:
    """The largest magnitudes, and the ratios to them in float32."""
    # a scale below the smallest normal number would not survive the division
    scale = blocks.abs().amax(dim=1).clamp_min_(torch.finfo(scales.dtype).tiny)
    scales.copy_(scale)
    widest = torch.promote_types(blocks.dtype, torch.float32)
    return torch.div(blocks.abs().to(widest), scale[:, None]).float()


def _encode_8(line: Tensor, codes: Tensor, scales: Tensor, noise: Tensor, signed: bool) -> None:
    lowest, offset, tiny = LOWEST[signed], OFFSET[signed], torch.finfo(scales.dtype).tiny
    if (compiled := _compiled(line, scales)) is not None:
        pointers = [address(tensor) for tensor in (line, codes, scales, noise)]
        compiled.encode_bytes(*pointers, line.numel(), tiny, offset, 1 - offset, lowest, signed)
        return
    blocks = _blocks(line, 256)
    bits = _scaled(blocks, scales).mul_(1 - offset).add_(offset).view(torch.int32)
    bits = bits.add_(noise).bitwise_right_shift_(_SHIFT).sub_(lowest)
    if signed:
        negative = blocks.float().view(torch.int32) >> 31  # -1 or 0: flipping all bits and adding 1 negates
        bits.bitwise_xor_(negative).sub_(negative)
    else:
        torch.maximum(bits, (blocks > 0).to(torch.int32), out=bits)
    codes.copy_(bits.view(-1)[: line.numel()])


def _encode_fp8(line: Tensor, codes: Tensor, scales: Tensor, noise: Tensor, signed: bool) -> None:
    if (compiled := _compiled(line, scales)) is not None:
        pointers = [address(tensor) for tensor in (line, codes, scales, noise)]
        compiled.encode_fp8(*pointers, line.numel(), torch.finfo(scales.dtype).tiny, signed)
        return
    blocks = _blocks(line, 256)
    value = _scaled(blocks, scales).mul_(_FP8_MAX)
    smallest = 2.0**-6  # below it the steps are even
    bits = (value.clamp_min(smallest).view(torch.int32) + noise).bitwise_right_shift_(_SHIFT).sub_(121 << 3)
    bits += (value.clamp_max(smallest) * 512 + noise.float() * 2.0**-20).to(torch.int32)
    if not signed:
        torch.maximum(bits, (value > 0).to(torch.int32), out=bits)
    bits += ((blocks < 0) & (bits > 0)).to(torch.int32) << 7
    codes.view(torch.uint8).copy_(bits.view(-1)[: line.numel()])


def _decode_bytes(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    kind = {torch.int8: "8 signed", torch.uint8: "8 unsigned"}.get(codes.dtype, "fp8")
    values = table(kind, codes.device)
    if (compiled := _compiled(out, scales)) is not None:
        compiled.decode_bytes(*(address(tensor) for tensor in (codes, scales, values, out)), out.numel())
        return
    part = _blocks(codes.view(torch.uint8), 256)
    decoded = values.index_select(0, part.view(-1).to(torch.int32)).view(-1, 256)
    out.copy_((decoded * scales[:, None]).view(-1)[: out.numel()])


def _encode_4(line: Tensor, codes: Tensor, scales: Tensor, noise: Tensor, signed: bool) -> None:
    tiny = torch.finfo(scales.dtype).tiny
    if (compiled := _compiled(line, scales)) is not None:
        pointers = [address(tensor) for tensor in (line, codes, scales, noise)]
        compiled.encode_nibbles(*pointers, line.numel(), tiny, address(LINES), signed)
        return
    blocks = _blocks(line, 128)
    ratio, raised = _scaled(blocks, scales), noise[:128].float() * 2.0**-20
    if signed:
        flip = -blocks.amin(dim=1) > blocks.amax(dim=1)
        scales[flip] = -scales[flip]
        place = ratio * LINES[0, 0].item() + LINES[0, 1].item()
        for slope, height in LINES[1:5].tolist():
            place = torch.minimum(place, ratio * slope + height)
        slope, height = LINES[5].tolist()
        place = torch.maximum(place, ratio * slope + height)
        negative = (blocks < 0) ^ (flip[:, None] & (blocks != 0))
        index = torch.minimum((place + raised).to(torch.int32), 8 - negative.to(torch.int32))
        index = torch.where(negative, 7 - index, 7 + index)
    else:
        index = (ratio * 16 - 1 + raised).clamp_min_(0).to(torch.int32).clamp_max_(15)
    index &= 15  # of a block that is not finite
    codes.view(torch.uint8).copy_((index[:, :64] | index[:, 64:] << 4).view(-1))


def _decode_4(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    values = table("4 signed" if codes.dtype is torch.int8 else "4 unsigned", codes.device)
    if (compiled := _compiled(out, scales)) is not None:
        compiled.decode_nibbles(*(address(tensor) for tensor in (codes, scales, values, out)), out.numel())
        return
    part = codes.view(torch.uint8).to(torch.int32).view(-1, 64)
    decoded = values.index_select(0, torch.cat([part & 15, part >> 4], dim=1).view(-1)).view(-1, 128)
    out.copy_((decoded * scales[:, None]).view(-1)[: out.numel()])


def _encode_bf16(line: Tensor, codes: Tensor, scales: Tensor, noise: Tensor, signed: bool) -> None:
    if (compiled := _compiled(line)) is not None:
        compiled.encode_bfloat16(*(address(tensor) for tensor in (line, codes, noise)), line.numel())
        return
    bits = _blocks(line.float(), 256).view(torch.int32) + (noise >> 4)
    codes.view(torch.int16).copy_((bits >> 16).view(-1)[: line.numel()])


def _decode_bf16(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    if (compiled := _compiled(out)) is not None:
        compiled.decode_bfloat16(address(codes), address(out), out.numel())
        return
    out.copy_(codes)


CODES: dict[int | str, Code] = {
    8: Code(8, 256, 1, _encode_8, _decode_bytes),
    4: Code(4, 128, 2, _encode_4, _decode_4),
    "fp8": Code("fp8", 256, 1, _encode_fp8, _decode_bytes),
    "bf16": Code("bf16", 0, 0, _encode_bf16, _decode_bf16),
}
"""Each code under its name in ``bits``."""
