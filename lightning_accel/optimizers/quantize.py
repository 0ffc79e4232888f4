"""Moments of an optimizer as codes: a tensor's elements, in the order in which they lie in memory, are coded as a line.

How a line is coded, and why the codes are as they are, is in :mod:`lightning_accel.optimizers.codes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_accel.optimizers.codes import CODES, Code, dither

__all__ = [
    "BLOCK",
    "decode_moment",
    "dequantize_blockwise",
    "empty_moment",
    "encode_moment",
    "line_of",
    "moment_bits",
    "pieces",
    "quantize_blockwise",
]

BLOCK = 256
"""Elements that share one scale in 8 bits."""
_CPU_PIECE = 2**16  # elements at a time, so that the intermediate results stay in the processor's cache

Moment = dict[str, Any]
"""A coded moment: ``codes`` and ``scales``, and in 4 bits the ``shape`` and ``stride`` of what was coded."""


def line_of(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def pieces(
    moment: Mapping[str, Any], size: int, length: int = _CPU_PIECE
) -> Iterator[tuple[int, int, Tensor, Tensor, Code]]:
    """Cut a moment of ``size`` elements into pieces that fit into the processor's cache.

    Yields:
        Where a piece starts and ends, its codes, its scales, and how they are coded.
    """
    code, codes, scales = CODES[moment_bits(moment)], line_of(moment["codes"]), moment["scales"]
    length = length if codes.device.type == "cpu" else max(size, 1)
    for start in range(0, size, length):
        end = min(start + length, size)
        if code.per_byte == 2:
            part = codes[start // 2 : start // 2 + -(-(end - start) // code.block) * (code.block // 2)]
        else:
            part = codes[start:end]
        first = start // code.block if code.block else 0
        yield start, end, part, scales[first : first + code.num_scales(end - start)], code


def moment_bits(moment: Mapping[str, Any]) -> int | str:
    """The name of a moment's code in :data:`lightning_accel.optimizers.codes.CODES`."""
    if "shape" in moment:
        return 4
    return {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}.get(moment["codes"].dtype, 8)


def empty_moment(tensor: Tensor, signed: bool, bits: int | str, dtype: torch.dtype | None = None) -> Moment:
    """Room for the codes of a dense tensor.

    Args:
        tensor: Of the shape and memory layout.
        signed: Whether it may be negative.
        bits: 8, 4, ``"fp8"`` or ``"bf16"``.
        dtype: Of the scales and of the decoded moment; that of ``tensor`` by default.
    """
    code, size = CODES[bits], tensor.numel()
    scales = tensor.new_empty(code.num_scales(size), dtype=dtype or tensor.dtype)
    if code.per_byte == 2:
        codes = tensor.new_empty(code.num_scales(size) * code.block // 2, dtype=code.dtype(signed))
        return {"codes": codes, "scales": scales, "shape": list(tensor.shape), "stride": list(tensor.stride())}
    return {"codes": torch.empty_like(tensor, dtype=code.dtype(signed)), "scales": scales}


@torch.no_grad()
def encode_moment(
    tensor: Tensor, signed: bool, step: int | None = 0, out: Mapping[str, Any] | None = None, bits: int | str = 8
) -> Moment:
    """Encode a floating-point tensor.

    Args:
        tensor: Of any shape and memory layout.
        signed: Whether it may be negative. An unsigned code never turns a positive value into zero.
        step: Selects how values between two codes are rounded; over consecutive steps they average to the value.
            ``None`` rounds to the nearest, which gives decoded values the codes that they came from.
        out: A moment to overwrite, where it fits.
        bits: 8, 4, ``"fp8"`` or ``"bf16"``.

    Returns:
        ``codes`` and ``scales``, one a block, in the dtype of ``tensor``. A block that is not finite is not finite when
        it is decoded.
    """
    if torch.empty_like(tensor).stride() != tensor.stride():  # not dense: its elements can't be read as one line
        tensor = tensor.contiguous()
    result = empty_moment(tensor, signed, bits)
    if out is not None and _alike(out, result):
        result = {**out}
    line, noise = line_of(tensor), dither(step, tensor.device)
    for start, end, codes, scales, code in pieces(result, tensor.numel()):
        code.encode(line[start:end], codes, scales, noise, signed)
    return result


@torch.no_grad()
def decode_moment(moment: Mapping[str, Any]) -> Tensor:
    """Decode what :func:`encode_moment` returned, to its shape, layout and dtype."""
    codes, dtype = moment["codes"], moment["scales"].dtype
    if "shape" in moment:
        result = torch.empty_strided(moment["shape"], moment["stride"], dtype=dtype, device=codes.device)
    else:
        result = torch.empty_like(codes, dtype=dtype)
    line = line_of(result)
    for start, end, part, scales, code in pieces(moment, result.numel()):
        code.decode(part, scales, line[start:end])
    return result


def quantize_blockwise(
    tensor: Tensor, signed: bool, step: int | None = 0, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Encode a floating-point tensor in 8 bits; the arguments are those of :func:`encode_moment`.

    Returns:
        The codes, ``int8`` if signed and ``uint8`` if not, in the shape and layout of ``tensor``; and the scales.
    """
    moment = encode_moment(tensor, signed, step, None if out is None else {"codes": out[0], "scales": out[1]})
    return moment["codes"], moment["scales"]


def dequantize_blockwise(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode what :func:`quantize_blockwise` returned, to its shape, layout and dtype."""
    return decode_moment({"codes": codes, "scales": scales})


def _alike(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    def form(moment: Mapping[str, Any]) -> list[Any]:
        parts = [moment["codes"], moment["scales"]]
        layout = [moment.get("shape"), moment.get("stride")]
        return [layout, *((part.shape, part.stride(), part.dtype, part.device) for part in parts)]

    return form(old) == form(new)
