"""OptimizerInBackward: step each parameter as its gradient arrives, so that the gradients never exist all at once.

A gradient is used up and freed before the backward pass goes on to the next layer. Lv et al. 2023, "Full Parameter
Fine-tuning for Large Language Models with Limited Resources" (LOMO), https://arxiv.org/abs/2306.09782, did it for SGD;
it holds for every optimizer that steps each parameter by itself. The steps, and so the weights, are those of the plain
run, bit for bit.

One optimizer stays one optimizer: the object, its groups, schedulers and checkpoints are those of the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.torch_version import TorchVersion

from lightning_accel.hooks import AccelCallback, Contract, OptimizerTransform, trainer_callbacks
from lightning_accel.hooks.replicas import leave_unwrapped
from lightning_accel.optimizers.independence import step_alone, why_not_alone
from lightning_accel.optimizers.low_bit_plan import hooked, retype_, without_hooks
from lightning_accel.optimizers.ordered_reduction import OrderedReduction

__all__ = ["Arrivals", "OptimizerInBackward", "step_in_backward_"]

_ONE_BACKWARD = "a step is made of the gradient of one backward pass, which is gone when the next begins"
_OWN_ENGINE = (
    "its engine reduces gradients and steps in flat buffers of its own. Use 'accel_fsdp2', 'accel_ddp' or 'ddp'."
)
_OFFLOADED_GRADIENTS_ARRIVE = TorchVersion(torch.__version__) >= "2.13"
"""Whether FSDP2 waits for a gradient's copy to the host before it calls the parameter's hooks."""


@dataclass
class Arrivals:
    """What is done to gradients as they arrive.

    Attributes:
        change: Called with each parameter before its step, to change its gradient.
        reduction: Of the gradients over ranks; None where they arrive reduced.
        names: Names of the parameters, for messages.
    """

    change: Callable[[Tensor], Any] | None = None
    reduction: OrderedReduction | None = None
    names: Mapping[Any, str] = field(default_factory=dict)


def step_in_backward_(optimizer: Optimizer, arrivals: Arrivals | None = None) -> Optimizer:
    """Have an optimizer step each parameter inside the backward pass of the closure that its ``step`` gets, in place.

    Args:
        optimizer: One that steps each parameter by itself.
        arrivals: What else is done to gradients.

    Returns:
        The same object.

    Raises:
        ValueError: If its parameters can't be stepped one at a time, with the reason.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> optimizer = step_in_backward_(torch.optim.SGD([weight], lr=0.1))
        >>> optimizer.step(lambda: weight.sum().backward())
        >>> weight.tolist(), weight.grad
        ([0.8999999761581421, 0.8999999761581421], None)
    """
    if isinstance(optimizer, InBackwardStep):
        raise ValueError(
            f"Expected an optimizer that steps after the backward pass, but this {type(optimizer).__name__} does not."
        )
    if reason := why_not_alone(optimizer):
        raise ValueError(f"Expected an optimizer that steps each parameter by itself, but {reason}.")
    base = type(optimizer)
    # The name stays, since loggers and LearningRateMonitor show it
    cls = type(base.__name__, (InBackwardStep, base), {"__module__": __name__, "_alone": base})
    retype_(optimizer, cls, arrivals=arrivals or Arrivals())
    return optimizer


class InBackwardStep(Optimizer):
    """What :func:`step_in_backward_` puts before an optimizer's own class."""

    arrivals: Arrivals
    _alone: type[Optimizer]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, whose backward pass steps the parameters; then step what else has a gradient."""
        loss = None
        if closure is not None:
            with self._stepping(), torch.enable_grad():
                loss = closure()
        without_hooks(self._alone.step)(self)
        return loss

    step = hooked(step)

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Step each parameter whose gradient is accumulated inside this."""
        groups = {item: group for group in self.param_groups for item in group["params"] if item.requires_grad}
        change, reduction = self.arrivals.change, self.arrivals.reduction
        arrived: set[Tensor] = set()

        def take(parameter: Tensor) -> None:
            if change is not None:
                change(parameter)
            step_alone(self, self._alone, groups[parameter], parameter)
            parameter.grad = None
            # torch's fused kernels and others leave it as it was; with it the backward pass fails where it needs the
            # former value, in the place of going on with the new one
            increment_version(parameter)

        @torch.no_grad()
        def arrive(parameter: Tensor) -> None:
            if parameter in arrived:
                raise RuntimeError(self._twice(parameter))
            arrived.add(parameter)
            take(parameter) if reduction is None else reduction.arrive(parameter)

        if reduction is not None:
            reduction.begin(list(groups), take)
        # inside a step only: a backward pass of something else, as in a validation, must not train
        handles = [parameter.register_post_accumulate_grad_hook(arrive) for parameter in groups]
        try:
            yield
            if reduction is not None:
                reduction.finish()
        finally:
            for handle in handles:
                handle.remove()

    def release(self) -> None:
        """Step after the backward pass again."""
        del self.arrivals
        retype_(self, self._alone)

    def _twice(self, parameter: Tensor) -> str:
        name = self.arrivals.names.get(parameter, f"a parameter of shape {tuple(parameter.shape)}")
        return (
            f"The gradient of {name} arrived twice in one step, when it had been stepped with the first part already. "
            "Make one backward pass of several, of the sum of their losses; checkpoint the activations of shared "
            "layers with `use_reentrant=False`. Or leave OptimizerInBackward out."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "arrivals": Arrivals()}  # a copy is not part of a fit


class OptimizerInBackward(OptimizerTransform):
    """Step each parameter as its gradient arrives in the backward pass, and free the gradient.

    Args:
        enabled: Whether to do so; ``False`` gives the plain run.

    Raises:
        TypeError: If ``enabled`` is not a bool.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[OptimizerInBackward()], logger=False, enable_checkpointing=False)
    """

    contract: ClassVar[Contract] = Contract(
        purpose="Step each parameter as its gradient arrives, so that gradients never exist all at once.",
        touches=frozenset({"optimizer", "gradients"}),
        acts="inside every backward pass",
        expects="less memory: one gradient at a time, not all",
        docs="methods/optimizer_in_backward",
        after=frozenset({"OptimizerTransform"}),  # all others: it steps whatever they make
        once=True,
        manual_optimization="there the module itself decides when to step. Set `automatic_optimization = True`.",
        refuses={
            "AccumulationWindow": f"{_ONE_BACKWARD}. Remove one of them.",
            "GradientAccumulationScheduler": f"{_ONE_BACKWARD}. Remove one of them.",
            "MicroBatching": f"{_ONE_BACKWARD}. Remove one of them.",
            "DeepSpeedStrategy": _OWN_ENGINE,
            "FSDPStrategy": "it keeps parameters and gradients flat. Use FullyShardStrategy (accel_fsdp2).",
            "ModelParallelStrategy": "when its gradients are reduced is up to `configure_model`. Use "
            "FullyShardStrategy (accel_fsdp2).",
            "ZeroRedundancyStrategy": "each rank steps its part of the parameters, when all gradients are reduced. Use "
            "FullyShardStrategy (accel_fsdp2), which splits gradients too, or 'accel_ddp'.",
        },
        accepts=frozenset({"FullyShardStrategy"}),
    )

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"Expected `enabled` to be a bool, but got {enabled!r}.")
        super().__init__(enabled=enabled)
        self.enabled = enabled
        self._trainer: Trainer | None = None
        self._reduction: OrderedReduction | None = None

    @property
    def is_neutral(self) -> bool:
        """Whether it is switched off."""
        return not self.enabled

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap ``configure_optimizers``; reduce gradients in the place of DDP, unless it is switched off."""
        if self.is_neutral:
            return
        self._trainer, self._reduction = trainer, None
        self.on_undo(self._forget)
        if isinstance(trainer.strategy, DDPStrategy):
            self._reduction = OrderedReduction(leave_unwrapped(self, trainer))
            self.patch(trainer.strategy, "backward", self._backward)
        self.patch(pl_module, "configure_gradient_clipping", _clip_what_is_left)
        super().install(trainer, pl_module)

    def _forget(self) -> None:
        self._trainer = self._reduction = None

    def _backward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Wait for the last gradients, before anyone looks at them."""
        assert self._reduction is not None
        result = original(*args, **kwargs)
        self._reduction.finish()
        return result

    def transform_optimizer(self, optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> Optimizer:
        """Have one optimizer step inside the backward pass, in place.

        Raises:
            MisconfigurationException: If something needs the gradients of all parameters at once.
        """
        trainer = self._trainer
        if trainer is None or self.plan is None:  # outside of a fit, to measure its state, which is the same
            return optimizer
        others = [other for other in self.plan.callbacks if other is not self and not other.is_idle]
        changing = [other for other in others if "gradients" in other.contract.touches]
        if reason := _needs_all(trainer, changing):
            raise MisconfigurationException(f"{type(self).__name__} can't work with {reason}")
        _warn_readers(trainer)
        value = trainer.gradient_clip_val

        def change(parameter: Tensor) -> None:
            for other in changing:
                other.change_gradient(parameter)
            if value:
                nn.utils.clip_grad_value_([parameter], value)

        try:
            step_in_backward_(optimizer, Arrivals(change if changing or value else None, self._reduction, names))
        except ValueError as error:
            raise MisconfigurationException(
                f"{type(self).__name__} can't work with {type(optimizer).__name__}: {error} Use another optimizer, "
                "such as AdamW, or leave it out."
            ) from error
        assert isinstance(optimizer, InBackwardStep)
        self.on_undo(optimizer.release)
        return optimizer


def _clip_what_is_left(original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
    """Clip gradients that did not come from the backward pass; torch fails where there is none."""
    if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
        original(optimizer, *args, **kwargs)


def _needs_all(trainer: Trainer, changing: list[AccelCallback]) -> str:
    """What needs the gradients of all parameters at once, the reason and the way out, or an empty string."""
    module = trainer.lightning_module
    if trainer.accumulate_grad_batches != 1:
        return (
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}): {_ONE_BACKWARD}. Remove one of them."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return (
            f"precision={trainer.precision!r}: its scaler looks at all gradients before it lets the first one be used. "
            "Use 'bf16-mixed'."
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != GradClipAlgorithmType.VALUE:
        return (
            "clipping by the norm of all gradients, which is known when the last one is there. Clip by value, with "
            "GradientClipping(by='value') or Trainer(gradient_clip_algorithm='value'), or each unit by itself, with "
            "GradientClipping(by='adaptive')."
        )
    if is_overridden("configure_gradient_clipping", module):
        return (
            f"`configure_gradient_clipping` of {type(module).__name__}, which is called when gradients are used up. "
            "Remove it, and clip with GradientClipping(by='value') or (by='adaptive')."
        )
    for other in changing:
        if type(other).change_gradient is AccelCallback.change_gradient:
            return f"{type(other).__name__}: it changes the gradients of a step together. Remove one of them."
    offloads = getattr(trainer.strategy, "offload", False) and trainer.strategy.root_device.type != "cpu"
    if offloads and not _OFFLOADED_GRADIENTS_ARRIVE:
        return (
            f"{type(trainer.strategy).__name__}(offload=True) in torch {torch.__version__}, where they may "
            "arrive before they are in the host's memory. Use torch 2.13 or newer, or leave one of them out."
        )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, (DDPStrategy, ModelParallelStrategy)):
        return (
            f"{type(trainer.strategy).__name__}: when it reduces gradients is not known. Use 'ddp', 'accel_ddp' or "
            "'accel_fsdp2'."
        )
    return ""


def _warn_readers(trainer: Trainer) -> None:
    """Name the hooks of others that are called when gradients are there in a plain run, and are not here."""
    # a checkpoint callback may keep the state of that moment; it has no use for gradients
    callbacks = [item for item in trainer_callbacks(trainer) if not isinstance(item, (AccelCallback, Checkpoint))]
    owners = [(trainer.lightning_module, LightningModule), *((item, Callback) for item in callbacks)]
    found = [
        f"{type(owner).__name__}.{hook}"
        for owner, parent in owners
        for hook in ("on_after_backward", "on_before_optimizer_step")
        if is_overridden(hook, owner, parent)
    ]
    if found:
        rank_zero_warn(
            f"OptimizerInBackward: {' and '.join(found)} will find no gradients: they are used and freed inside the "
            "backward pass. What logs or changes them there has no effect; hooks of the parameters "
            "(`Tensor.register_hook`) see them."
        )
