"""Low-bit state for any torch optimizer, with that optimizer's own maths.

The optimizer keeps its class's ``step``. Around it, the moments of a few parameters at a time are decoded to floating
point, stepped and encoded again, so that only those few exist at full size. The object is changed in place: it gets a
subclass of its own class, and everything that refers to it stays valid (schedulers, hooks, parameter groups).

In ``optimizer.state[parameter]`` a coded moment is ``{"codes": ..., "scales": ...}`` under the name that the optimizer
gave it, see :mod:`lightning_accel.optimizers.quantize`; everything else is as it was. Of a
sharded parameter (a DTensor) each rank keeps the codes of its part, whose blocks are its own; so a state dict has those
moments decoded, sharded like the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_accel.errors import check_choice, check_int
from lightning_accel.optimizers.adam_pieces import can_step_pieces, step_pieces_
from lightning_accel.optimizers.layouts import (
    check_same_class,
    is_of_a_library,
    plain_state_dict,
    quantized_moments,
)
from lightning_accel.optimizers.low_bit_plan import (
    BITS,
    MOMENTS,
    LowBitPlan,
    as_part_of,
    hooked,
    loaded_parameters,
    local_part,
    refusal,
    retype_,
    say_bits,
    spread,
    without_hooks,
)
from lightning_accel.optimizers.quantize import decode_moment, encode_moment, moment_bits
from lightning_accel.optimizers.stochastic_rounding import generator_for, round_to_bfloat16_

__all__ = ["QuantizedState", "quantize_optimizer_"]

_BUCKET = 2**20  # elements of parameters whose moments are decoded at a time, at least
_CUDA_BUCKET = 2**24  # and at most on CUDA, where few kernels on much are faster


def quantize_optimizer_(
    optimizer: Optimizer,
    min_size: int = 4096,
    keep: Collection[Tensor] = (),
    moments: Mapping[str, bool] | None = None,
    names: Mapping[Any, str] | None = None,
    say: Callable[[str], Any] = print,
    warn: Callable[[str], Any] | None = None,
    bits: int | str = 8,
    chosen: Mapping[Any, int | str] | None = None,
    seed: int | None = None,
    save_32bit: bool = False,
) -> Optimizer:
    """Keep the moments of an optimizer in 8 bits or another code, in place.

    Args:
        optimizer: Of any class of ``torch.optim`` or derived from :class:`torch.optim.Optimizer`. For a class that is
            not torch's own the moments of all parameters are decoded at once during ``step``.
        min_size: Parameters with fewer elements keep their state in 32 bits.
        keep: Parameters that keep their state in 32 bits.
        moments: Names of state that is quantised besides torch's (:data:`MOMENTS`), and whether it may be negative.
        names: Names of the parameters, for messages.
        say: Told in one line when a loaded checkpoint had to be converted.
        warn: Told after the first step where the optimizer keeps no state that is quantised.
        bits: 8, 4, ``"fp8"``, ``"bf16"``; or 32, which turns a low-bit checkpoint back.
        chosen: Parameters that have bits of their own.
        seed: Step bfloat16 parameters in float32 and round them at random, by draws from this seed and the step.
        save_32bit: Let a state dict have the moments decoded, so that an optimizer without low-bit state can load it.

    Returns:
        The same object.

    Raises:
        ValueError: If its state can't be quantised, with the reason.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(64, 64))
        >>> optimizer = quantize_optimizer_(torch.optim.AdamW([weight]))
        >>> weight.grad = torch.ones(64, 64)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg_sq"]["codes"].dtype
        torch.uint8
    """
    check_int("min_size", min_size, minimum=1)
    check_choice("bits", bits, BITS)
    if reason := refusal(optimizer):
        raise ValueError(f"Expected an optimizer whose state can be quantised, but {reason}.")
    base = type(optimizer)
    if seed is not None and not _is_torchs(base):
        raise ValueError(
            f"Expected an optimizer of torch.optim for stochastic rounding, but got {base.__name__}: what else its "
            "`step` does to a parameter is not known."
        )
    own = {**dict.fromkeys(keep, 32), **(chosen or {})}
    plan = LowBitPlan(min_size, bits, own, {**MOMENTS, **(moments or {})}, names or {}, say, seed=seed)
    plan.save_32bit = save_32bit
    if warn is not None:
        plan.warn = warn
    plan.order = {parameter: index for index, parameter in enumerate(_parameters(optimizer))}
    retype_(optimizer, _quantized_class(base), low_bit=plan)
    _encode(optimizer, _parameters(optimizer), plan)
    return optimizer


def _is_torchs(base: type[Optimizer]) -> bool:
    return base.__module__.startswith("torch.optim.")


def _quantized_class(base: type[Optimizer]) -> type[Optimizer]:
    # The name stays, since loggers and LearningRateMonitor show it.
    return type(base.__name__, (QuantizedState, base), {"__module__": __name__, "_base": base})


class QuantizedState(Optimizer):
    """What :func:`quantize_optimizer_` puts before an optimizer's own class."""

    low_bit: LowBitPlan
    _base: type[Optimizer]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step of the optimizer's own class on decoded moments, and encode them again."""
        step = without_hooks(self._base.step)
        for group in self.param_groups:
            group["low_bit_step"] = group.get("low_bit_step", 0) + 1
        if not _is_torchs(self._base):  # it may count steps or look at all parameters at once
            result = self._step_on(list(_parameters(self)), lambda: step(self, closure))
            found = any(map(quantized_moments, self.state.values()))
            sought = self.low_bit.bits != 32 and any(map(self.low_bit.is_low_bit, _parameters(self)))
            if self.param_groups[0]["low_bit_step"] == 1 and sought and not found:
                self.low_bit.warn(
                    f"no state of {type(self).__name__} is known to be a moment; name it in `moments` to quantise it."
                )
            return result
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            parameters = group["params"]
            try:
                self.param_groups = [group]
                rest = []
                for parameter in parameters:
                    if can_step_pieces(self, group, parameter):
                        step_pieces_(self, group, parameter)
                    else:
                        rest.append(parameter)
                for bucket in _buckets(rest):
                    self._place_steps(group, bucket)
                    with self._widened(group, bucket) as stepped:
                        group["params"] = stepped
                        self._step_on(stepped, lambda: step(self))
            finally:
                self.param_groups, group["params"] = groups, parameters
        return loss

    step = hooked(step)

    def _place_steps(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Put the counts of steps, which :func:`step_pieces_` keeps in main memory, where torch's step wants them."""
        for parameter in parameters:
            step = self.state.get(parameter, {}).get("step")
            if isinstance(step, Tensor) and (group.get("fused") or group.get("capturable")):
                self.state[parameter]["step"] = step.to(parameter.device)

    @contextmanager
    def _widened(self, group: dict[str, Any], parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters in float32 in place of those in bfloat16 that are rounded at random afterwards."""
        plan = self.low_bit
        wide = {parameter: parameter.detach().float() for parameter in parameters if plan.is_wide(parameter)}
        for parameter, copy in wide.items():
            copy.grad = parameter.grad.float() if parameter.grad is not None else None
            plan.chosen[copy] = plan.bits_of(parameter)
            if parameter in self.state:
                self.state[copy] = self.state.pop(parameter)
        try:
            yield [wide.get(parameter, parameter) for parameter in parameters]
        finally:
            for parameter, copy in wide.items():
                del plan.chosen[copy]
                if copy in self.state:
                    self.state[parameter] = self.state.pop(copy)
                    generator = generator_for(plan, parameter, group["low_bit_step"])
                    round_to_bfloat16_(local_part(parameter.detach()), local_part(copy), generator)

    def _step_on(self, parameters: list[Tensor], step: Callable[[], Any]) -> Any:
        for parameter in parameters:
            if self.low_bit.is_low_bit(parameter):
                self.low_bit.refuse_sparse(parameter)
        held = _decode(self, parameters)
        try:
            return step()
        finally:
            _encode(self, parameters, self.low_bit, held)

    def state_dict(self) -> dict[str, Any]:
        """The state, with the moments of sharded parameters decoded: their codes fit no other number of ranks."""
        result: dict[str, Any] = super().state_dict()
        state, parameters = dict(result["state"]), loaded_parameters(self, result)
        for index, parameter in parameters.items():
            if index in state and (self.low_bit.save_32bit or isinstance(parameter, DTensor)):
                moments = quantized_moments(state[index])
                state[index] = {**state[index], **{name: _value(parameter, m) for name, m in moments.items()}}
        return {**result, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer bit for bit, or convert one with moments in another number of bits.

        Raises:
            ValueError: If it is the state of another class of optimizer.
        """
        parameters = loaded_parameters(self, state_dict)
        if any(map(is_of_a_library, state_dict["state"].values())):
            state_dict = plain_state_dict(state_dict, self)
        check_same_class(state_dict, self)
        state = {
            index: {name: spread(parameters[index], value) for name, value in entries.items()}
            if index in parameters
            else entries
            for index, entries in state_dict["state"].items()
        }
        # torch would cast these to the parameter's dtype
        own: dict[Any, dict[str, Any]] = {
            index: {**quantized_moments(entries), **_wide_state(self.low_bit, parameters[index], entries)}
            for index, entries in state.items()
            if index in parameters
        }
        rest = {
            index: {name: value for name, value in entries.items() if name not in own[index]}
            if index in own
            else entries
            for index, entries in state.items()
        }
        super().load_state_dict({**state_dict, "state": rest})
        decoded = 0
        for index, moments in own.items():
            parameter = parameters[index]
            dtype = _dtype(self.low_bit, parameter)
            for name, moment in moments.items():
                if isinstance(moment, Tensor):
                    self.state[parameter][name] = moment.detach().to(parameter.device, dtype, copy=True)
                    continue
                kept = {k: v.to(parameter.device, copy=True) if isinstance(v, Tensor) else v for k, v in moment.items()}
                if isinstance(parameter, DTensor):  # saved where it was whole
                    self.state[parameter][name] = spread(parameter, decode_moment(kept).to(dtype))
                    continue
                bits = self.low_bit.bits_of(parameter)
                same = moment_bits(kept) == bits and kept["scales"].dtype == dtype
                self.state[parameter][name] = kept if same else decode_moment(kept).to(dtype)
                decoded += bits == 32
        converted = _encode(self, _parameters(self), self.low_bit, nearest=True) + decoded
        if converted and not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            loaded = {self.low_bit.bits_of(parameters[index]) for index in own}
            into = " and ".join(say_bits(bits) for bits in BITS if bits in loaded and (bits != 32 or decoded))
            self.low_bit.say(f"Converted {converted} moments of a {type(self).__name__} checkpoint to {into}.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters get the next places, which decide how they are rounded."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.low_bit.order[parameter] = len(self.low_bit.order)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "low_bit": self.low_bit}


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters with a gradient, in lists of about ``_BUCKET`` elements, or on CUDA of a sixteenth of them all."""
    bucket: list[Tensor] = []
    size, limit = 0, _BUCKET
    if any(parameter.device.type == "cuda" for parameter in parameters):
        limit = min(max(limit, sum(map(torch.numel, parameters)) // 16), _CUDA_BUCKET)
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if bucket and size + parameter.numel() > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def _dtype(plan: LowBitPlan, parameter: Tensor) -> torch.dtype:
    """Of a parameter's moments when they are decoded."""
    return torch.float32 if plan.is_wide(parameter) else parameter.dtype


def _wide_state(plan: LowBitPlan, parameter: Tensor, entries: Any) -> dict[str, Tensor]:
    """The state in float32 of a parameter in bfloat16."""
    if not plan.is_wide(parameter) or not isinstance(entries, dict):
        return {}
    return {name: v for name, v in entries.items() if isinstance(v, Tensor) and v.shape == parameter.shape}


def _decode(optimizer: Optimizer, parameters: list[Tensor]) -> dict[tuple[Tensor, str], dict[str, Any]]:
    """Decode the moments of ``parameters``; return what they were, for its memory to be used again."""
    held = {}
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for name, moment in quantized_moments(state).items():
            held[parameter, name] = moment
            value = _value(parameter, moment)
            if value.stride() != parameter.stride():  # loaded into a model with another memory layout
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            state[name] = value
    return held


def _value(parameter: Tensor, moment: Mapping[str, Any]) -> Tensor:
    """A decoded moment of a parameter; of a sharded one sharded like it."""
    return as_part_of(parameter, decode_moment(moment))


def _encode(
    optimizer: Optimizer,
    parameters: Collection[Tensor] | Iterator[Tensor],
    plan: LowBitPlan,
    held: Mapping[tuple[Tensor, str], dict[str, Any]] | None = None,
    *,
    nearest: bool = False,
) -> int:
    """Encode the moments of ``parameters`` that are not; return how many."""
    settings = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    count = 0
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if not state or not plan.is_low_bit(parameter):
            continue
        group = settings[parameter]
        for name, signed in plan.moments.items():
            value = state.get(name)
            if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.is_floating_point():
                continue
            if name == "square_avg" and group.get("centered"):
                continue  # its difference to the squared mean must not become negative
            step = None if nearest else group.get("low_bit_step", 0)
            old = (held or {}).get((parameter, name))
            state[name] = encode_moment(local_part(value), signed, step, old, plan.bits_of(parameter))
            count += 1
    return count
