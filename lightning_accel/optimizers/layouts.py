"""The layouts in which low-bit optimizer state is saved, and the way from each of them back to torch's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.optimizers.quantize import BLOCK, decode_moment

__all__ = [
    "bitsandbytes_names",
    "bitsandbytes_parts",
    "check_same_class",
    "is_of_a_library",
    "plain_state_dict",
    "quantized_moments",
    "torchao_parts",
]

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


_PARTS = ({"codes", "scales"}, {"codes", "scales", "shape", "stride"})
_TORCHAO_PARTS = ({"codes", "scale"}, {"codes", "scale", "qmap"}, {"codes", "scale", "qmap", "shape"})
_KEPT: dict[type[Optimizer], tuple[set[str], set[str]]] = {
    torch.optim.Adam: ({"exp_avg", "exp_avg_sq"}, {"max_exp_avg_sq"}),
    torch.optim.AdamW: ({"exp_avg", "exp_avg_sq"}, {"max_exp_avg_sq"}),
    torch.optim.RAdam: ({"exp_avg", "exp_avg_sq"}, set()),
    torch.optim.NAdam: ({"exp_avg", "exp_avg_sq", "mu_product"}, set()),
    torch.optim.Adamax: ({"exp_avg", "exp_inf"}, set()),
    torch.optim.SGD: (set(), {"momentum_buffer"}),
    torch.optim.RMSprop: ({"square_avg"}, {"momentum_buffer", "grad_avg"}),
    torch.optim.Adagrad: ({"sum"}, set()),
    torch.optim.Adadelta: ({"square_avg", "acc_delta"}, set()),
}
"""What torch's classes keep of a parameter besides the step: always, and with some options."""


def check_same_class(state_dict: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Refuse the state of another class of optimizer, which torch would load without a word.

    Raises:
        ValueError: If an entry has not what this class keeps, or has what it does not know.
    """
    known = next((_KEPT[cls] for cls in type(optimizer).__mro__ if cls in _KEPT), None)
    if known is None:
        return
    always, sometimes = known
    for entries in state_dict["state"].values():
        names = set(entries) - {"step"} if isinstance(entries, dict) else set()
        if names and not (always <= names <= always | sometimes):
            expected = ", ".join(sorted(always or sometimes))
            raise ValueError(
                f"Expected a checkpoint of {type(optimizer).__name__}, which keeps {expected} of a parameter, but got "
                f"one with {', '.join(sorted(names))}: it is of another class of optimizer. Resume with that class, or "
                "start from the weights alone."
            )


def quantized_moments(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The moments of one parameter that :func:`quantize_optimizer_` keeps in few bits."""
    return {name: value for name, value in entries.items() if isinstance(value, dict) and set(value) in _PARTS}


def bitsandbytes_parts(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter in the layout of bitsandbytes, or an empty dict if it is in another."""
    parts = {**entries, **entries.get(_WRAPPED, {})}
    parts.pop(_WRAPPED, None)
    return parts if "state1" in parts else {}


def torchao_parts(value: Any) -> dict[str, Any]:
    """What a moment coded by torchao is made of, from its tensor or as it is saved here; or an empty dict.

    ``codes`` and a ``scale`` a block; the table of values ``qmap``, but for fp8; and in 4 bits, of which two are in a
    byte, the ``shape``.
    """
    if isinstance(value, Tensor) and hasattr(value, "codes"):
        names = ("codes", "scale", "qmap")
        parts = {name: getattr(value, name) for name in names if hasattr(value, name)}
        return parts if value.codes.shape == value.shape else {**parts, "shape": list(value.shape)}
    return dict(value) if isinstance(value, dict) and set(value) in _TORCHAO_PARTS else {}


def is_of_a_library(entries: Any) -> bool:
    """Whether the state of one parameter is in the layout of bitsandbytes or of torchao."""
    if not isinstance(entries, dict):
        return False
    return bool(bitsandbytes_parts(entries)) or any(map(torchao_parts, entries.values()))


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
            decoded = {name: decode_moment(moment) for name, moment in quantized_moments(entries).items()}
            coded = {name: parts for name, value in entries.items() if (parts := torchao_parts(value))}
            entries = {**entries, **decoded, **{name: _from_torchao(parts) for name, parts in coded.items()}}
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


def _from_torchao(parts: Mapping[str, Any]) -> Tensor:
    codes, scale = parts["codes"], parts["scale"]
    if "shape" in parts:
        codes = torch.stack([codes >> 4, codes & 15], dim=-1)
    ratios = parts["qmap"][codes.int()] if "qmap" in parts else codes.float()
    values: Tensor = ratios.view(len(scale), -1) * scale.view(-1, 1)
    return values.view(parts.get("shape", codes.shape))
