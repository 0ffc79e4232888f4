"""8-bit state for any torch optimizer, with that optimizer's own maths.

The optimizer keeps its class's ``step``. Around it, the moments of a few parameters at a time are decoded to floating
point, stepped and encoded again, so that only those few exist at full size. The object is changed in place: it gets a
subclass of its own class, and everything that refers to it stays valid (schedulers, hooks, parameter groups).

In ``optimizer.state[parameter]`` a quantised moment is ``{"codes": int8 or uint8, "scales": floating point}`` under the
name that the optimizer gave it, see :mod:`lightning_accel.optimizers.quantize`; everything else is as it was. Of a
sharded parameter (a DTensor) each rank keeps the codes of its part, whose blocks are its own; so a state dict has those
moments decoded, sharded like the parameter.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_accel.errors import NoEffectWarning, check_int
from lightning_accel.optimizers.layouts import bitsandbytes_parts, plain_state_dict, quantized_moments
from lightning_accel.optimizers.quantize import dequantize_blockwise, quantize_blockwise

__all__ = ["MOMENTS", "LowBitPlan", "QuantizedState", "quantize_optimizer_", "refusal", "retype_", "without_moments"]

MOMENTS = {
    "exp_avg": True,
    "momentum_buffer": True,
    "exp_avg_sq": False,
    "max_exp_avg_sq": False,
    "exp_inf": False,
    "square_avg": False,
    "acc_delta": False,
    "sum": False,
}
"""The state that is quantised, by torch's names: whether it may be negative. All other state is kept as it is."""

_BUCKET = 2**20  # elements of parameters whose moments are decoded at a time


def _warn(message: str) -> None:
    warnings.warn(f"Low-bit state has no effect: {message}", NoEffectWarning, stacklevel=2)


@dataclass
class LowBitPlan:
    """Which state of an optimizer is quantised, and how to tell the user what was done to it."""

    min_size: int = 4096
    keep: set[Tensor] = field(default_factory=set)
    moments: Mapping[str, bool] = field(default_factory=lambda: MOMENTS)
    names: Mapping[Tensor, str] = field(default_factory=dict)
    say: Callable[[str], Any] = print
    warn: Callable[[str], Any] = _warn

    def is_low_bit(self, parameter: Tensor) -> bool:
        """Whether this parameter's moments are quantised."""
        return parameter.numel() >= self.min_size and parameter.is_floating_point() and parameter not in self.keep

    def refuse_sparse(self, parameter: Tensor) -> None:
        """Raise ``RuntimeError`` where the gradient is sparse."""
        if parameter.grad is not None and parameter.grad.is_sparse:
            name = self.names.get(parameter, "?")
            raise RuntimeError(
                f"Expected dense gradients for low-bit optimizer state, but that of {name!r} is sparse. Make its layer "
                f"with sparse=False, or keep its state in 32 bits: keep_32bit=[{name!r}]."
            )


def refusal(optimizer: Optimizer) -> str:
    """Why the state of this optimizer can't be quantised, or an empty string."""
    name = type(optimizer).__name__
    if isinstance(optimizer, QuantizedState):
        return f"the state of this {name} is quantised already"
    if isinstance(optimizer, torch.optim.LBFGS):
        return f"{name} keeps a history of gradients, not moments a parameter; use another optimizer"
    if isinstance(optimizer, torch.optim.SparseAdam):
        return f"{name} is for sparse gradients, whose moments are updated in a few rows; use Adam with sparse=False"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return f"{name}(differentiable=True) needs its state in the autograd graph; use differentiable=False"
    if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return f"`step` of this {name} object was replaced by something else; replace it after this"
    return ""


def without_moments(optimizer: Optimizer) -> str:
    """Why an optimizer of torch keeps no moments that could be quantised, or an empty string."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.Adafactor):
        return f"{name} already keeps one number a row and one a column"
    if isinstance(optimizer, torch.optim.ASGD):
        return f"the state of {name} is an average of the weights, which 8 bits would spoil"
    if isinstance(optimizer, torch.optim.Rprop):
        return f"{name} depends on the signs of single gradients and on step sizes, which 8 bits would spoil"
    if isinstance(optimizer, (torch.optim.SGD, torch.optim.RMSprop)):
        with_momentum = any(group["momentum"] for group in optimizer.param_groups)
        if isinstance(optimizer, torch.optim.SGD) and not with_momentum:
            return f"{name} without momentum keeps no state"
        if all(group.get("centered") for group in optimizer.param_groups) and not with_momentum:
            return f"{name}(centered=True) takes the root of a small difference of its two averages"
    return ""


def quantize_optimizer_(
    optimizer: Optimizer,
    min_size: int = 4096,
    keep: Collection[Tensor] = (),
    moments: Mapping[str, bool] | None = None,
    names: Mapping[Any, str] | None = None,
    say: Callable[[str], Any] = print,
    warn: Callable[[str], Any] = _warn,
) -> Optimizer:
    """Keep the moments of an optimizer in 8 bits, in place.

    Args:
        optimizer: Of any class of ``torch.optim`` or derived from :class:`torch.optim.Optimizer`. For a class that is
            not torch's own the moments of all parameters are decoded at once during ``step``.
        min_size: Parameters with fewer elements keep their state in 32 bits.
        keep: Parameters that keep their state in 32 bits.
        moments: Names of state that is quantised besides torch's (:data:`MOMENTS`), and whether it may be negative.
        names: Names of the parameters, for messages.
        say: Told in one line when a loaded checkpoint had to be converted.
        warn: Told after the first step where the optimizer keeps no state that is quantised.

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
    if reason := refusal(optimizer):
        raise ValueError(f"Expected an optimizer whose state can be quantised, but {reason}.")
    plan = LowBitPlan(min_size, set(keep), {**MOMENTS, **(moments or {})}, names or {}, say, warn)
    base = type(optimizer)
    retype_(optimizer, _quantized_class(base), low_bit=plan)
    _encode(optimizer, _parameters(optimizer), plan)
    return optimizer


def retype_(optimizer: Optimizer, cls: type[Optimizer], **attributes: Any) -> None:
    """Make an optimizer an object of ``cls``, a subclass of its class, and give it the attributes that it declares."""
    optimizer.__class__ = cls
    vars(optimizer).update(attributes)
    if vars(optimizer).pop("step", None) is not None:
        # A scheduler put a wrapper there, bound to the former class's `step`, to notice that `step` was called.
        reference = weakref.ref(optimizer)

        def step(*args: Any, **kwargs: Any) -> Any:
            target: Any = reference()
            target._opt_called = True
            return cls.step(target, *args, **kwargs)

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        optimizer.step = step  # type: ignore[method-assign]


def without_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's ``step`` without the wrapper by which torch runs the hooks: they run once, around ours."""
    inner: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
    return inner


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A ``step`` around which torch runs the hooks of the optimizer."""
    wrapped = Optimizer.profile_hook_step(step)
    wrapped.hooked = True  # type: ignore[attr-defined]  # or torch would wrap it once more
    return wrapped


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
        if not self._base.__module__.startswith("torch.optim."):  # it may count steps or look at all parameters at once
            result = self._step_on(list(_parameters(self)), lambda: step(self, closure))
            if self.param_groups[0]["low_bit_step"] == 1 and not any(map(quantized_moments, self.state.values())):
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
                for bucket in _buckets(parameters):
                    group["params"] = bucket
                    self._step_on(bucket, lambda: step(self))
            finally:
                self.param_groups, group["params"] = groups, parameters
        return loss

    step = hooked(step)

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
        state, parameters = dict(result["state"]), _loaded_parameters(self, result)
        for index, parameter in parameters.items():
            if isinstance(parameter, DTensor) and index in state:
                moments = quantized_moments(state[index])
                state[index] = {**state[index], **{name: _value(parameter, **m) for name, m in moments.items()}}
        return {**result, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer bit for bit, or convert one with 32-bit moments."""
        if any(isinstance(entries, dict) and bitsandbytes_parts(entries) for entries in state_dict["state"].values()):
            state_dict = plain_state_dict(state_dict, self)
        state, parameters = dict(state_dict["state"]), _loaded_parameters(self, state_dict)
        codes = {index: quantized_moments(entries) for index, entries in state.items() if index in parameters}
        # torch would cast the codes to the parameter's dtype
        rest = {
            index: {name: value for name, value in entries.items() if name not in codes[index]}
            if index in codes
            else entries
            for index, entries in state.items()
        }
        super().load_state_dict({**state_dict, "state": rest})
        for index, moments in codes.items():
            parameter = parameters[index]
            for name, moment in moments.items():
                kept = {key: value.to(parameter.device, copy=True) for key, value in moment.items()}
                if isinstance(parameter, DTensor):  # saved where it was whole
                    mesh, whole = parameter.device_mesh, dequantize_blockwise(**kept).to(parameter.dtype)
                    spread = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
                    self.state[parameter][name] = spread.redistribute(mesh, parameter.placements)
                    continue
                same = self.low_bit.is_low_bit(parameter) and moment["scales"].dtype == parameter.dtype
                self.state[parameter][name] = kept if same else dequantize_blockwise(**kept).to(parameter.dtype)
        converted = _encode(self, _parameters(self), self.low_bit, nearest=True)
        if converted and not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            self.low_bit.say(f"Converted {converted} moments of a {type(self).__name__} checkpoint to 8 bits.")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "low_bit": self.low_bit}


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _loaded_parameters(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[Any, Tensor]:
    """The parameter of each index of a state dict."""
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    return dict(zip(indices, _parameters(optimizer), strict=False))  # torch tells which group does not fit


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters with a gradient, in lists of about ``_BUCKET`` elements."""
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if bucket and size + parameter.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def _decode(optimizer: Optimizer, parameters: list[Tensor]) -> dict[tuple[Tensor, str], dict[str, Tensor]]:
    """Decode the moments of ``parameters``; return what they were, for its memory to be used again."""
    held = {}
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for name, moment in quantized_moments(state).items():
            held[parameter, name] = moment
            value = _value(parameter, **moment)
            if value.stride() != parameter.stride():  # loaded into a model with another memory layout
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            state[name] = value
    return held


def _value(parameter: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """A decoded moment of a parameter; of a sharded one sharded like it."""
    value = dequantize_blockwise(codes, scales)
    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _encode(
    optimizer: Optimizer,
    parameters: Collection[Tensor] | Iterator[Tensor],
    plan: LowBitPlan,
    held: Mapping[tuple[Tensor, str], dict[str, Tensor]] | None = None,
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
            old = (held or {}).get((parameter, name))
            out = (old["codes"], old["scales"]) if old else None
            local = value.to_local() if isinstance(value, DTensor) else value
            step = None if nearest else group.get("low_bit_step", 0)
            codes, scales = quantize_blockwise(local, signed, step, out)
            state[name] = {"codes": codes, "scales": scales}
            count += 1
    return count
