"""The step of Adam and AdamW on low-bit state, without its moments ever being there at full size.

On the CPU the moments of a piece of a parameter are decoded into the processor's cache, stepped there by torch's fused
kernel, and encoded again; the last bits are those of ``fused=True``. On CUDA one kernel does all three for a parameter,
in registers. The maths is that of the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_accel.optimizers.codes import dither
from lightning_accel.optimizers.kernels import triton_on
from lightning_accel.optimizers.layouts import quantized_moments
from lightning_accel.optimizers.low_bit_plan import local_part
from lightning_accel.optimizers.quantize import empty_moment, line_of, pieces
from lightning_accel.optimizers.stochastic_rounding import generator_for, round_to_bfloat16_

__all__ = ["can_step_pieces", "step_pieces_", "takes_pieces"]

_PIECE = 2**15
"""Elements of a piece: its weights, gradients and two moments take 512 KiB."""


def takes_pieces(base: type[Optimizer], group: Mapping[str, Any]) -> bool:
    """Whether a group's parameters are stepped so, as far as the optimizer's class and the group's options go."""
    if base not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    if group.get("foreach") is not None or group.get("fused") is False or group.get("capturable"):
        return False
    return not any(isinstance(value, Tensor) for value in (group["lr"], group["weight_decay"], *group["betas"]))


def can_step_pieces(optimizer: Any, group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether this parameter can be stepped so."""
    if parameter.grad is None or not takes_pieces(optimizer._base, group):
        return False
    if parameter.device.type != "cpu" and triton_on(parameter.device) is None:
        return False
    if getattr(optimizer, "grad_scale", None) is not None:
        return False
    plan = optimizer.low_bit
    if not plan.is_low_bit(parameter) or not (parameter.dtype is torch.float32 or plan.is_wide(parameter)):
        return False
    local, gradient = local_part(parameter.detach()), parameter.grad
    if gradient.is_sparse or gradient.dtype != parameter.dtype or type(local) is not Tensor:
        return False
    if isinstance(parameter, DTensor) and (
        not isinstance(gradient, DTensor) or gradient.placements != parameter.placements
    ):
        return False
    # loaded into a model with another memory layout, they are coded in the new one after the optimizer's own step
    moments = quantized_moments(optimizer.state.get(parameter, {})).values()
    layouts = [moment.get("stride") or list(moment["codes"].stride()) for moment in moments]
    return torch.empty_like(local).stride() == local.stride() and all(
        layout == list(local.stride()) for layout in layouts
    )


@torch.no_grad()
def step_pieces_(optimizer: Any, group: Mapping[str, Any], parameter: Tensor) -> None:
    """Step one parameter whose gradient is there."""
    weight, gradient = local_part(parameter.detach()), local_part(parameter.grad.detach())  # type: ignore[union-attr]
    if gradient.stride() != weight.stride():
        gradient = torch.empty_like(weight).copy_(gradient)
    plan, wide = optimizer.low_bit, optimizer.low_bit.is_wide(parameter)
    state = optimizer.state[parameter]
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
    state["step"] = state["step"].to("cpu", torch.float32) + 1
    moments = [_moment(state, name, weight, plan.bits_of(parameter)) for name in names]
    noise = dither(group["low_bit_step"], weight.device)
    generator = generator_for(plan, parameter, group["low_bit_step"]) if wide else None
    weights, gradients = line_of(weight), line_of(gradient)
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
    if (triton := triton_on(weight.device)) is not None:
        stepped = weights.float()
        triton.adam_step_(
            stepped,
            gradients,
            [(line_of(moment["codes"]), moment["scales"]) for moment in moments],
            noise,
            plan.bits_of(parameter),
            float(state["step"]),
            decoupled=decoupled,
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")},
        )
        if generator is not None:
            round_to_bfloat16_(weights, stepped, generator)
        return
    buffers = [torch.empty(min(_PIECE, weight.numel()), dtype=torch.float32) for _ in names]
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    cuts = [pieces(moment, weight.numel(), _PIECE) for moment in moments]
    for parts in zip(*cuts, strict=True):
        start, end = parts[0][:2]
        values = [buffer[: end - start] for buffer in buffers]
        for (_, _, codes, scales, code), value in zip(parts, values, strict=True):
            code.decode(codes, scales, value)
        own = weights[start:end]
        stepped = own.float() if wide else own
        kernel(
            [stepped],
            [gradients[start:end].float()],
            values[:1],
            values[1:2],
            values[2:],
            [state["step"]],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )
        if generator is not None:
            round_to_bfloat16_(own, stepped, generator)
        for name, (_, _, codes, scales, code), value in zip(names, parts, values, strict=True):
            code.encode(value, codes, scales, noise, name == "exp_avg")


def _moment(state: dict[str, Any], name: str, weight: Tensor, bits: int | str) -> dict[str, Any]:
    """A coded moment; a new one is zero."""
    if name not in state:
        moment = empty_moment(weight, name == "exp_avg", bits, torch.float32)
        length = min(_PIECE, weight.numel()) if weight.device.type == "cpu" else weight.numel()
        zeros, noise = weight.new_zeros(length, dtype=torch.float32), dither(None, weight.device)
        for start, end, codes, scales, code in pieces(moment, weight.numel(), _PIECE):
            code.encode(zeros[: end - start], codes, scales, noise, name == "exp_avg")
        state[name] = moment
    coded: dict[str, Any] = state[name]
    return coded
