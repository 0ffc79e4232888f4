"""State in 8 bits, 4 or fp8 by the tensors and the step of torchao, for Adam and AdamW.

torchao computes the step of a parameter, with its moments decoded before and coded after, by one function, which
``torch.compile`` fuses. What it does not compute as torch does (``maximize``, ``amsgrad``, weight decay that is
decoupled in some groups) :func:`torchao_refusal` names, and an optimizer that would be changed is never handed over.
The object stays the same one, with its groups, hooks and schedulers; its class becomes a subclass of both torchao's
class and its own.

torchao takes the learning rate as a tensor, since all other numbers are compiled in: a tensor is made for each step,
and the groups keep numbers, which schedulers overwrite. It quantises what has at least 4096 elements, all in the same
number of bits; here ``min_size`` and the bits of each parameter count. Blocks are whole, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_accel.errors import check_choice, check_int, require
from lightning_accel.optimizers.layouts import check_same_class, plain_state_dict, torchao_parts
from lightning_accel.optimizers.low_bit_plan import (
    BITS,
    LowBitPlan,
    hooked,
    loaded_parameters,
    refusal,
    retype_,
    say_bits,
    without_hooks,
)

__all__ = ["TORCHAO_BLOCKS", "TorchAOState", "fits_blocks", "torchao_missing", "torchao_refusal", "use_torchao_"]

TORCHAO_BLOCKS: dict[int | str, int] = {8: 256, 4: 128, "fp8": 256}
"""Elements that share one scale, of each number of bits that torchao has."""
_PURPOSE = "Low-bit state by torchao"


def torchao_refusal(optimizer: Optimizer) -> str:
    """Why torchao can't keep this optimizer's maths, or an empty string."""
    if reason := refusal(optimizer):
        return reason
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"torchao has no optimizer with the maths of {type(optimizer).__name__}"
    if reason := _option_refusal(optimizer):
        return reason
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.is_floating_point() or parameter.dtype is torch.float64:
                return f"torchao computes in float32, and there are parameters in {parameter.dtype}"
            if isinstance(parameter, DTensor):
                return (
                    "torchao codes a decoded moment otherwise than it was, and that of sharded parameters is saved so"
                )
            if parameter.device.type != "cpu" and "max_momentum" in group:
                return (
                    "torchao compiles its step again for each value of `betas`, which a schedule changes at every step"
                )
    return ""


def _option_refusal(optimizer: Optimizer) -> str:
    """Which option of the parameter groups torchao does not compute as torch does, or an empty string."""
    for group in optimizer.param_groups:
        for option in ("amsgrad", "maximize", "capturable"):
            if group.get(option):
                return f"torchao has no `{option}`"
        if any(isinstance(value, Tensor) for value in (group["weight_decay"], *group["betas"])):
            return "torchao does not take options that are tensors, but for `lr`"
    if any(_is_decoupled(optimizer, group) != _is_decoupled(optimizer) for group in optimizer.param_groups):
        return "torchao decouples `weight_decay` in all groups or in none"
    return ""


def _is_decoupled(optimizer: Optimizer, group: Mapping[str, Any] | None = None) -> bool:
    # torch before 2.7 has no such option
    adamw = isinstance(optimizer, torch.optim.AdamW)
    return bool((group or optimizer.param_groups[0]).get("decoupled_weight_decay", adamw))


def torchao_missing(device_type: str) -> str:
    """Why the optimizers of torchao can't be used on a device, or an empty string."""
    try:
        require("torchao.optim", "torchao", _PURPOSE)
    except ImportError:
        return "torchao is not installed"
    if device_type != "cpu":
        from torch.utils._triton import has_triton

        if not has_triton():
            return f"torch.compile, which torchao needs on {device_type}, has no Triton here"
    return ""


def fits_blocks(parameter: Tensor, bits: int | str) -> bool:
    """Whether a parameter is made of whole blocks of torchao."""
    return bits in TORCHAO_BLOCKS and parameter.numel() > 0 and parameter.numel() % TORCHAO_BLOCKS[bits] == 0


def use_torchao_(
    optimizer: Optimizer,
    min_size: int = 4096,
    keep: Collection[Tensor] = (),
    names: Mapping[Any, str] | None = None,
    say: Callable[[str], Any] = print,
    bits: int | str = 8,
    chosen: Mapping[Any, int | str] | None = None,
    save_32bit: bool = False,
) -> Optimizer:
    """Keep the moments of an optimizer in few bits by torchao, in place.

    Args:
        optimizer: A ``torch.optim.AdamW`` or ``Adam`` with options that torchao computes.
        min_size: Parameters with fewer elements keep their state in 32 bits; so do those that don't divide into blocks.
        keep: Parameters that keep their state in 32 bits.
        names: Names of the parameters, for messages.
        say: Told in one line when a loaded checkpoint had to be converted.
        bits: 8, 4 or ``"fp8"``.
        chosen: Parameters that have bits of their own.
        save_32bit: Let a state dict have the moments decoded, so that an optimizer without low-bit state can load it.

    Returns:
        The same object.

    Raises:
        ImportError: If torchao is not installed.
        ValueError: If its maths would change, with the option that is the reason.
    """
    check_int("min_size", min_size, minimum=1)
    own = {**dict.fromkeys(keep, 32), **(chosen or {})}
    for value in (bits, *own.values()):
        check_choice("bits", value, (*TORCHAO_BLOCKS, 32))
    if reason := torchao_refusal(optimizer):
        raise ValueError(f"Expected an optimizer whose maths torchao computes, but {reason}.")
    base, library = type(optimizer), require("torchao.optim", "torchao", _PURPOSE)
    kernel = getattr(library, f"{base.__name__}8bit")  # the step is the same in all numbers of bits
    attributes = {
        "__module__": __name__,
        "_kernel": kernel,
        "is_adamw": _is_decoupled(optimizer),
        "bf16_stochastic_round": False,  # it draws from the global random state, in which replicas may differ
    }
    plan = LowBitPlan(min_size, bits, own, names=names or {}, say=say, save_32bit=save_32bit)
    _keep_uneven(plan, [parameter for group in optimizer.param_groups for parameter in group["params"]])
    before = optimizer.state_dict() if optimizer.state else None
    retype_(optimizer, type(base.__name__, (TorchAOState, kernel, base), attributes), low_bit=plan)
    # its `step` neither unscales gradients itself nor has a fused form
    vars(optimizer).pop("_step_supports_amp_scaling", None)
    for group in [optimizer.defaults, *optimizer.param_groups]:
        group.update({name: None for name in ("fused", "foreach") if name in group})
    if before is not None:
        optimizer.load_state_dict(before)
    return optimizer


def _keep_uneven(plan: LowBitPlan, parameters: Collection[Tensor]) -> None:
    """Leave the state of parameters in 32 bits that are not made of whole blocks."""
    plan.chosen.update({p: 32 for p in parameters if plan.is_low_bit(p) and not fits_blocks(p, plan.bits_of(p))})


class TorchAOState(Optimizer):
    """What :func:`use_torchao_` puts before the class of torchao and the optimizer's own."""

    low_bit: LowBitPlan
    _kernel: type[Optimizer]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step of torchao, unless an option was changed to one that it does not compute."""
        if reason := _option_refusal(self):
            raise RuntimeError(f"An option was changed during training, but {reason}: use backend='generic'.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            self.low_bit.refuse_sparse(parameter)
        # On the CPU compiling takes longer than most runs, and the step is slow with it and without.
        on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.as_tensor(rate, dtype=torch.float32)
            with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
                without_hooks(self._kernel.step)(self)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        return loss

    step = hooked(step)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        """Zeros, in the place of torchao's method, which decides by sizes alone."""
        from torchao.optim.subclass_4bit import OptimState4bit
        from torchao.optim.subclass_8bit import OptimState8bit
        from torchao.optim.subclass_fp8 import OptimStateFp8

        bits = self.low_bit.bits_of(p)
        if not fits_blocks(p, bits):
            return torch.zeros_like(p)
        block, where = TORCHAO_BLOCKS[bits], {"device": p.device, "dtype": p.dtype}
        if bits == "fp8":
            made: Tensor = OptimStateFp8.zeros(p.shape, block, **where)
        else:
            made = (OptimState4bit if bits == 4 else OptimState8bit).zeros(p.shape, signed, block, **where)
        return made

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its rate stays a number."""
        Optimizer.add_param_group(self, param_group)  # not torchao's, which makes a tensor of it
        _keep_uneven(self.low_bit, self.param_groups[-1]["params"])

    def state_dict(self) -> dict[str, Any]:
        """The state, with coded moments as dictionaries of plain tensors; or decoded, if that is asked for."""
        result: dict[str, Any] = super().state_dict()
        state = {
            index: {name: self._saved(value) for name, value in entries.items()}
            for index, entries in result["state"].items()
        }
        return {**result, "state": state}

    def _saved(self, value: Any) -> Any:
        parts = torchao_parts(value)
        return value.dequantize(value.dtype) if parts and self.low_bit.save_32bit else parts or value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer bit for bit, or convert one with moments in another layout.

        Raises:
            ValueError: If it is the state of another class of optimizer.
        """
        state: dict[Any, dict[str, Any]] = {}
        converted = []
        for index, parameter in loaded_parameters(self, state_dict).items():
            entries = state_dict["state"].get(index, {})
            plain = plain_state_dict({"state": {0: entries}, "param_groups": []}, self)
            check_same_class(plain, self)
            state[index] = plain["state"][0]
            for name in {"exp_avg", "exp_avg_sq"} & set(state[index]):
                value: Any = self._new_buffer(parameter, name == "exp_avg")
                saved, coded = torchao_parts(entries.get(name)), torchao_parts(value)
                if saved and _alike(saved, coded):
                    value.codes.copy_(saved["codes"])
                    value.scale.copy_(saved["scale"])
                else:
                    value.copy_(state[index][name].to(value.device, value.dtype))
                    if coded or not isinstance(entries.get(name), Tensor):
                        converted.append(self.low_bit.bits_of(parameter))
                state[index][name] = value
        groups = plain_state_dict({**state_dict, "state": {}}, self)["param_groups"]
        super().load_state_dict(
            {"state": {i: entries for i, entries in state.items() if entries}, "param_groups": groups}
        )
        if converted:
            into = " and ".join(say_bits(bits) for bits in BITS if bits in converted)
            self.low_bit.say(f"Converted {len(converted)} moments of a {type(self).__name__} checkpoint to {into}.")


def _alike(saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether two coded moments have the same code and size."""
    return saved.keys() == own.keys() and all(
        saved[name].shape == own[name].shape and saved[name].dtype == own[name].dtype for name in ("codes", "scale")
    )
