"""What the low-bit backends share: which state is coded in how many bits, what can't be, and changing an optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_accel.errors import NoEffectWarning

__all__ = [
    "BITS",
    "MOMENTS",
    "LowBitPlan",
    "as_part_of",
    "hooked",
    "loaded_parameters",
    "local_part",
    "refusal",
    "retype_",
    "say_bits",
    "spread",
    "view_of",
    "without_hooks",
    "without_moments",
]

BITS: tuple[int | str, ...] = (8, 4, "fp8", "bf16", 32)
"""What a moment may be kept in; 32 is as torch keeps it."""

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


def _warn(message: str) -> None:
    warnings.warn(f"Low-bit state has no effect: {message}", NoEffectWarning, stacklevel=2)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_part_of(parameter: Tensor, local: Tensor) -> Tensor:
    """A tensor of the size of this rank's part of a parameter; of a sharded one sharded like it."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    made: Tensor = DTensor.from_local(local, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
    return made


def spread(parameter: Tensor, value: Any) -> Any:
    """A value that was saved whole, sharded like a sharded parameter; any other as it is."""
    fits = isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == parameter.shape
    if not isinstance(parameter, DTensor) or not fits:
        return value
    mesh = parameter.device_mesh
    whole = DTensor.from_local(value.to(parameter.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, parameter.placements)


def loaded_parameters(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[Any, Tensor]:
    """The parameter of each index of a state dict."""
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return dict(zip(indices, parameters, strict=False))  # torch tells which group does not fit


def say_bits(bits: int | str) -> str:
    """A number of bits in words."""
    return f"{bits} bits" if isinstance(bits, int) else {"bf16": "bfloat16"}.get(bits, bits)


@dataclass
class LowBitPlan:
    """Which state of an optimizer is coded in how many bits, and how to tell the user what was done to it.

    Attributes:
        min_size: Parameters with fewer elements keep their state in 32 bits.
        bits: Of the parameters that are not in ``chosen``.
        chosen: Parameters that have bits of their own; 32 is the state that the optimizer keeps itself.
        moments: The names of state that is coded, and whether it may be negative.
        names: Names of the parameters, for messages.
        say: Told in one line when a loaded checkpoint had to be converted.
        warn: Told that the optimizer keeps no state that is coded.
        seed: Of the rounding of bfloat16 parameters; None leaves their steps to the optimizer.
        save_32bit: Whether a state dict has the moments decoded.
    """

    min_size: int = 4096
    bits: int | str = 8
    chosen: dict[Tensor, int | str] = field(default_factory=dict)
    moments: Mapping[str, bool] = field(default_factory=lambda: MOMENTS)
    names: Mapping[Tensor, str] = field(default_factory=dict)
    say: Callable[[str], Any] = print
    warn: Callable[[str], Any] = _warn
    seed: int | None = None
    save_32bit: bool = False
    order: dict[Tensor, int] = field(default_factory=dict)

    def bits_of(self, parameter: Tensor) -> int | str:
        """In how many bits this parameter's moments are kept."""
        if parameter.numel() < self.min_size or not parameter.is_floating_point():
            return 32
        return self.chosen.get(parameter, self.bits)

    def is_low_bit(self, parameter: Tensor) -> bool:
        """Whether this parameter's moments are coded."""
        return self.bits_of(parameter) != 32

    def is_wide(self, parameter: Tensor) -> bool:
        """Whether this parameter is stepped in float32 and rounded to bfloat16 at random."""
        return self.seed is not None and parameter.dtype is torch.bfloat16

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
    if hasattr(optimizer, "low_bit"):
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
        return f"the state of {name} is an average of the weights, which few bits would spoil"
    if isinstance(optimizer, torch.optim.Rprop):
        return f"{name} depends on the signs of single gradients and on step sizes, which few bits would spoil"
    if isinstance(optimizer, (torch.optim.SGD, torch.optim.RMSprop)):
        with_momentum = any(group["momentum"] for group in optimizer.param_groups)
        if isinstance(optimizer, torch.optim.SGD) and not with_momentum:
            return f"{name} without momentum keeps no state"
        if all(group.get("centered") for group in optimizer.param_groups) and not with_momentum:
            return f"{name}(centered=True) takes the root of a small difference of its two averages"
    return ""


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


def view_of(optimizer: Optimizer, cls: type[Optimizer], groups: list[dict[str, Any]], **attributes: Any) -> Any:
    """An object of ``cls`` with the attributes of an optimizer, its state among them, and groups of its own."""
    view = cls.__new__(cls)
    vars(view).update(vars(optimizer), param_groups=groups, **attributes)
    return view


def without_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's ``step`` without the wrapper by which torch runs the hooks: they run once, around ours."""
    inner: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
    return inner


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A ``step`` around which torch runs the hooks of the optimizer."""
    wrapped = Optimizer.profile_hook_step(step)
    wrapped.hooked = True  # type: ignore[attr-defined]  # or torch would wrap it once more
    return wrapped
