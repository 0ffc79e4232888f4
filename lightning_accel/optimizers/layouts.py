"""The layouts in which low-bit optimizer state is saved, and the way from each of them back to torch's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.optimizers.quantize import BLOCK, dequantize_blockwise

__all__ = ["bitsandbytes_names", "bitsandbytes_parts", "plain_state_dict", "quantized_moments"]

_NAMES: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.RMSprop: ("square_avg",),
}
_WRAPPED = "__bnb_optimizer_quant_state__"  # under which newer bitsandbytes hides the tensors of a parameter


def bitsandbytes_names(optimizer: Optimizer) -> tuple[str, ...]:
    """What torch calls the moments that bitsandbytes calls ``state1`` and ``state2``."""
    return next((names for cls, names in _NAMES.items() if isinstance(optimizer, cls)), ())


def quantized_moments(entries: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The moments of one parameter that :func:`quantize_optimizer_` keeps in 8 bits."""
    return {name: value for name, value in entries.items() if isinstance(value, dict) and set(value) == _PARTS}


_PARTS = {"codes", "scales"}


def bitsandbytes_parts(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter in the layout of bitsandbytes, or an empty dict if it is in another."""
    parts = {**entries, **entries.get(_WRAPPED, {})}
    parts.pop(_WRAPPED, None)
    return parts if "state1" in parts else {}


def plain_state_dict(state_dict: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Decode a low-bit state dict to the layout of torch, for an optimizer without low-bit state.

    Args:
        state_dict: From the ``state_dict`` method of an optimizer with low-bit state, or from a checkpoint.
        optimizer: Of the class that the state is for; it is only looked at.

    Returns:
        A new state dict that ``optimizer.load_state_dict`` accepts; what was not low-bit is shared with the old one.
    """
    state = {}
    for index, entries in state_dict["state"].items():
        if isinstance(entries, dict):
            decoded = {name: dequantize_blockwise(**moment) for name, moment in quantized_moments(entries).items()}
            entries = {**entries, **decoded}
            if parts := bitsandbytes_parts(entries):
                entries = _from_bitsandbytes(parts, optimizer)
        state[index] = entries
    groups = [{name: value for name, value in group.items() if name != "low_bit_step"} for group in _groups(state_dict)]
    return {**state_dict, "state": state, "param_groups": groups}


def _groups(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = state_dict["param_groups"]
    return groups


def _from_bitsandbytes(parts: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    if not isinstance(optimizer, torch.optim.SGD):
        plain["step"] = torch.tensor(float(parts["step"]))
    for number, name in enumerate(bitsandbytes_names(optimizer), start=1):
        value = parts[f"state{number}"]
        if value.dtype is torch.uint8:
            ratios = parts[f"qmap{number}"][value.flatten().long()]
            scales = parts[f"absmax{number}"].repeat_interleave(BLOCK)[: value.numel()]
            value = (ratios * scales).view(value.shape)
        plain[name] = value
    return plain
