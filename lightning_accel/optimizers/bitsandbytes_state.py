"""8-bit state by the kernels of bitsandbytes, for the torch optimizers whose maths they compute.

bitsandbytes computes other maths than torch in places: weight decay of its Adam is always decoupled, and ``maximize``,
``nesterov`` and ``dampening`` are ignored without a word. :func:`bitsandbytes_refusal` names each of these, and an
optimizer that would be changed is never handed over. The object stays the same one, with its groups, hooks and
schedulers; its class becomes a subclass of both bitsandbytes' class and its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_accel.errors import check_int, require
from lightning_accel.optimizers.layouts import (
    bitsandbytes_names,
    bitsandbytes_parts,
    check_same_class,
    plain_state_dict,
)
from lightning_accel.optimizers.low_bit_plan import LowBitPlan, hooked, refusal, retype_, without_hooks

__all__ = ["BitsAndBytesState", "bitsandbytes_missing", "bitsandbytes_refusal", "paged_refusal", "use_bitsandbytes_"]

_CLASSES: dict[type[Optimizer], str] = {
    torch.optim.AdamW: "AdamW8bit",
    torch.optim.Adam: "Adam8bit",
    torch.optim.SGD: "SGD8bit",
    torch.optim.RMSprop: "RMSprop8bit",
}


def bitsandbytes_refusal(optimizer: Optimizer) -> str:
    """Why bitsandbytes can't keep this optimizer's maths, or an empty string."""
    if reason := refusal(optimizer):
        return reason
    if type(optimizer) not in _CLASSES:
        return f"bitsandbytes has no optimizer with the maths of {type(optimizer).__name__}"
    for group in optimizer.param_groups:
        if reason := option_refusal(optimizer, group):
            return reason
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                return f"bitsandbytes has no {parameter.dtype} parameters"
            if not parameter.is_contiguous():
                return "bitsandbytes would change the memory layout (channels_last) of its parameters"
    return ""


def paged_refusal(optimizer: Optimizer) -> str:
    """Why bitsandbytes can't page the state of this optimizer, or an empty string."""
    if not isinstance(optimizer, torch.optim.Adam):
        return f"bitsandbytes has no paged {type(optimizer).__name__}"
    for device in sorted({parameter.device.type for group in optimizer.param_groups for parameter in group["params"]}):
        if device != "cuda":
            return (
                f"paged state moves between a CUDA GPU and main memory, and there are parameters on the {device} device"
            )
    return ""


def option_refusal(optimizer: Optimizer, group: Mapping[str, Any]) -> str:
    """Which option of a parameter group bitsandbytes does not compute as torch does, or an empty string."""
    name = "Adam" if isinstance(optimizer, torch.optim.Adam) else type(optimizer).__name__
    for option in ("amsgrad", "maximize", "nesterov", "dampening", "centered", "capturable"):
        if group.get(option):
            return f"bitsandbytes has no `{option}`"
    if any(isinstance(group.get(option), Tensor) for option in ("lr", "weight_decay")) or any(
        isinstance(beta, Tensor) for beta in group.get("betas", ())
    ):
        return "bitsandbytes does not take options that are tensors"
    if name == "Adam" and group["weight_decay"] and not group.get("decoupled_weight_decay", _is_adamw(optimizer)):
        return "bitsandbytes decouples `weight_decay`, which Adam adds to the gradient (L2)"
    if isinstance(optimizer, torch.optim.SGD) and not group["momentum"]:
        return "SGD without momentum keeps no state"
    if isinstance(optimizer, torch.optim.RMSprop) and group["momentum"]:
        return "bitsandbytes ignores the `momentum` of RMSprop"
    return ""


def _is_adamw(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.AdamW)


@functools.cache
def bitsandbytes_missing(device_type: str) -> str:
    """Why the 8-bit optimizers of bitsandbytes can't be used on a device, or an empty string; found by trying one."""
    try:
        kernels = require("bitsandbytes", "bitsandbytes", "Low-bit state by bitsandbytes").optim
        weight = torch.nn.Parameter(torch.ones(256, device=device_type))
        weight.grad = torch.ones_like(weight)
        kernels.AdamW8bit([weight], min_8bit_size=1).step()
    except ImportError:
        return "bitsandbytes is not installed"
    except Exception as error:
        return f"bitsandbytes does not work on {device_type} here ({type(error).__name__}: {error})"
    return ""


def use_bitsandbytes_(
    optimizer: Optimizer,
    min_size: int = 4096,
    keep: Collection[Tensor] = (),
    names: Mapping[Any, str] | None = None,
    say: Callable[[str], Any] = print,
    paged: bool = False,
) -> Optimizer:
    """Keep the moments of an optimizer in 8 bits by the kernels of bitsandbytes, in place.

    Args:
        optimizer: A ``torch.optim.AdamW``, ``Adam``, ``SGD`` or ``RMSprop`` with options that bitsandbytes computes.
        min_size: Parameters with fewer elements keep their state in 32 bits.
        keep: Parameters that keep their state in 32 bits. bitsandbytes' process-wide manager is not involved.
        names: Names of the parameters, for messages.
        say: Told in one line when a loaded checkpoint had to be converted.
        paged: Keep the state of parameters with at least 100,000 elements where the GPU's memory and main memory are
            one, so that what does not fit into the first is moved as it is needed.

    Returns:
        The same object.

    Raises:
        ImportError: If bitsandbytes is not installed.
        ValueError: If its maths would change, with the option that is the reason; or if its state can't be paged.
    """
    check_int("min_size", min_size, minimum=1)
    if reason := bitsandbytes_refusal(optimizer):
        raise ValueError(f"Expected an optimizer whose maths bitsandbytes computes, but {reason}.")
    if paged and (reason := paged_refusal(optimizer)):
        raise ValueError(f"Expected an optimizer whose state can be paged, but {reason}.")
    library = require("bitsandbytes", "bitsandbytes", "Low-bit state by bitsandbytes").optim
    kernel = getattr(library, f"Paged{_class(optimizer)}" if paged else _class(optimizer))
    arguments = {"momentum": 0.9} if kernel.__name__ == "SGD8bit" else {}
    donor = kernel([torch.nn.Parameter(torch.zeros(1))], lr=0.1, min_8bit_size=min_size, **arguments)
    base = type(optimizer)
    mixed = type(base.__name__, (BitsAndBytesState, kernel, base), {"__module__": __name__, "_kernel": kernel})
    plan = LowBitPlan(min_size, chosen=dict.fromkeys(keep, 32), names=names or {}, say=say)
    before = optimizer.state_dict() if optimizer.state else None
    retype_(optimizer, mixed, low_bit=plan)
    for name, value in vars(donor).items():
        vars(optimizer).setdefault(name, value)
    # its `step` neither unscales gradients itself nor has a fused form
    vars(optimizer).pop("_step_supports_amp_scaling", None)
    for group in [optimizer.defaults, *optimizer.param_groups]:
        group.update({name: None for name in ("fused", "foreach") if name in group})
    if before is not None:
        optimizer.load_state_dict(before)
    return optimizer


def _class(optimizer: Optimizer) -> str:
    return _CLASSES[type(optimizer)]


class BitsAndBytesState(Optimizer):
    """What :func:`use_bitsandbytes_` puts before the class of bitsandbytes and the optimizer's own."""

    low_bit: LowBitPlan
    _kernel: type[Optimizer]
    name2qmap: dict[str, Tensor]
    is_paged: bool
    get_state_buffer: Callable[..., Tensor]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step of bitsandbytes, unless an option was changed to one that it does not compute."""
        for group in self.param_groups:
            if reason := option_refusal(self, group):
                raise RuntimeError(f"An option was changed during training, but {reason}: use backend='generic'.")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        else:
            loss = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.low_bit.refuse_sparse(parameter)
        without_hooks(self._kernel.step)(self)
        return loss

    step = hooked(step)

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """The options of one parameter, read from torch's names at every step, and its number of bits."""
        if isinstance(self, torch.optim.SGD):
            betas = (group["momentum"], 0.0)
        elif isinstance(self, torch.optim.RMSprop):
            betas = (group["alpha"], 0.0)
        else:
            betas = group["betas"]
        return {
            "betas": betas,
            "eps": group.get("eps", 0.0),
            "weight_decay": group["weight_decay"],
            "lr": group["lr"],
            "alpha": 0.0,
            "t_alpha": None,
            "t_beta3": None,
            "optim_bits": 8 if self.low_bit.is_low_bit(group["params"][pindex]) else 32,
            "min_8bit_size": self.low_bit.min_size,
            "max_unorm": 0.0,
            "skip_zeros": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # not through the torch class, which would make a tensor of the step
        Optimizer.__setstate__(self, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer bit for bit, or convert one with moments in another layout."""
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = dict(zip(indices, (p for group in self.param_groups for p in group["params"]), strict=False))
        plain = plain_state_dict(state_dict, self)["state"]
        check_same_class({"state": plain}, self)
        state, converted = {}, 0
        for index, parameter in parameters.items():
            entries = state_dict["state"].get(index, {})
            native = bitsandbytes_parts(entries)
            if native and (native["state1"].dtype is torch.uint8) == self.low_bit.is_low_bit(parameter):
                state[index] = native
            elif all(plain.get(index, {}).get(name) is not None for name in bitsandbytes_names(self)):
                state[index] = self._native(parameter, plain[index])
                converted += 1
        groups = plain_state_dict(state_dict, self)["param_groups"]
        # bitsandbytes would load all of them into the memory of the GPU, and leave them there
        paged = {
            index: {name: native.pop(name) for name in ("state1", "state2")} if self.is_paged else {}
            for index, native in state.items()
        }
        super().load_state_dict({"state": state, "param_groups": groups})
        for index, moments in paged.items():
            for name, value in moments.items():
                buffer = self.get_state_buffer(parameters[index], dtype=value.dtype)
                self.state[parameters[index]][name] = buffer.copy_(value)
        if converted:
            name = type(self).__name__
            self.low_bit.say(f"Converted the state of {converted} parameters of a {name} checkpoint for bitsandbytes.")

    def _native(self, parameter: Tensor, plain: Mapping[str, Any]) -> dict[str, Any]:
        """The state of one parameter in the layout of bitsandbytes."""
        from bitsandbytes.functional import quantize_blockwise

        native: dict[str, Any] = {"step": int(plain.get("step", 1))}
        for number, (name, code) in enumerate(zip(bitsandbytes_names(self), ("dynamic", "udynamic"), strict=False), 1):
            value = plain[name].to(parameter.device, torch.float32, copy=True).contiguous()
            if self.low_bit.is_low_bit(parameter):
                self.name2qmap[code] = self.name2qmap[code].to(parameter.device)
                value, details = quantize_blockwise(value, code=self.name2qmap[code], blocksize=256)
                native |= {f"qmap{number}": self.name2qmap[code], f"absmax{number}": details.absmax}
            native[f"state{number}"] = value.cpu() if self.is_paged else value
        return native
