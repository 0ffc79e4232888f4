"""The step of a ZeRO engine: clipping, weighing and freezing where the gradients are reduced, split and in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_accel.strategies.zero_gradients import (
    clear_gradients,
    load_partial_gradients,
    partial_gradients,
)

__all__ = ["ZeROPrecision"]


class ZeROPrecision(DeepSpeedPrecision):
    """Precision under DeepSpeed: real autocast for ``bf16-mixed``, and clipping for whoever asks for it.

    Args:
        precision: ``"32-true"``, ``"bf16-mixed"``, ``"bf16-true"``, ``"16-mixed"`` or ``"16-true"``.
    """

    def __init__(self, precision: Any) -> None:
        super().__init__(precision)
        self.device_type = "cpu"
        self.before_step: Callable[[], set[int]] = set
        """Called before every step; returns the numbers of the groups that are frozen now."""
        self._clip: tuple[float, GradClipAlgorithmType] | None = None
        self._weight = 1.0
        self._skipped = 0
        self._accumulated = False  # whether there are gradients that no step has used
        self.gradients_saved = False
        """Whether they were read for a checkpoint since the last backward."""

    @property
    def autocast(self) -> bool:
        """Whether the module stays in fp32 and its operations run in bfloat16."""
        return bool(self.precision == "bf16-mixed")

    def convert_input(self, data: Any) -> Any:
        """Autocast converts what it needs by itself."""
        return data if self.autocast else super().convert_input(data)

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast for code that runs outside the engine's forward as well."""
        return torch.autocast(self.device_type, torch.bfloat16) if self.autocast else super().forward_context()

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip in the step that follows, where the gradients are reduced and in fp32."""
        self._clip = (float(clip_val or 0.0), GradClipAlgorithmType(gradient_clip_algorithm or "norm"))

    def watch(self, engine: Any) -> None:
        """Let ``zero_grad`` of the engine's optimizer forget what was reduced already; DeepSpeed's does not."""
        optimizer, kind = engine.optimizer, type(engine.optimizer)

        def zero_grad(_: Any, set_to_none: bool = True) -> None:
            kind.zero_grad(optimizer, set_to_none)
            if self._accumulated:
                clear_gradients(engine)
                self._accumulated = False

        # In its class: Lightning's wrapper of an optimizer inherits from that, and sees no attribute of the instance
        optimizer.__class__ = type(kind.__name__, (kind,), {"zero_grad": zero_grad})
        self._clip, self._weight, self._skipped, self._accumulated = None, 1.0, engine.skipped_steps, False

    def partial_gradients(self, engine: Any) -> dict[str, Tensor]:
        """This rank's gradients that no step has used, for a checkpoint."""
        self.gradients_saved = True
        return partial_gradients(engine) if self._accumulated and not engine.zenflow else {}

    def load_partial_gradients(self, engine: Any, gradients: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`partial_gradients` gave."""
        if not engine.zenflow and load_partial_gradients(engine, gradients):
            self._accumulated = True

    def weigh_gradients(self, weight: float) -> None:
        """Multiply the gradients by ``weight`` in the step that follows, before they are clipped; 0 leaves it out."""
        self._weight *= weight

    def backward(  # type: ignore[override]  # as in the base class
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Add to the gradients, also where one `training_step` calls this several times."""
        engine: Any = model.trainer.model
        # Else a second backward in one forward would replace the gradients of the first at stage 3
        engine.optimizer.clear_backward_seen_flag()
        self._accumulated, self.gradients_saved = True, False
        super().backward(tensor, model, optimizer, *args, **kwargs)

    def optimizer_step(  # type: ignore[override]  # as in the base class
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the closure, then the engine's step."""
        engine: Any = model.trainer.model
        if isinstance(engine.basic_optimizer, LBFGS):
            raise MisconfigurationException(
                "LBFGS evaluates the loss several times in a step, which ZeRO does not. Use another optimizer, or "
                "strategy='accel_ddp'."
            )
        result = closure()
        self._after_closure(model, optimizer)
        if model.automatic_optimization and result is None:
            raise MisconfigurationException(
                "`training_step` returned None on this rank, and the others would wait for it. Return a loss of zero "
                "instead: `sum(parameter.sum() for parameter in self.parameters()) * 0.0`."
            )
        amount, algorithm = self._clip or (0.0, GradClipAlgorithmType.NORM)
        weight, self._weight, self._clip = self._weight, 1.0, None
        by_norm = algorithm == GradClipAlgorithmType.NORM
        # the engine clips before they are weighed
        engine.optimizer.clip_grad = amount / weight if by_norm and weight else 0.0
        frozen = self.before_step()
        if weight == 0.0:
            frozen = set(range(len(engine.basic_optimizer.param_groups)))
        changes: list[Callable[[Tensor], Any]] = []
        if weight != 1.0:
            changes.append(lambda gradient: gradient.mul_(weight))
        if amount and not by_norm:
            changes.append(lambda gradient: gradient.clamp_(-amount, amount))
        self._accumulated = False  # stage 3 calls `zero_grad` within its step, when the gradients are still needed
        _step(engine, frozen, changes)
        clear_gradients(engine)
        if engine.skipped_steps != self._skipped:
            self._skipped = engine.skipped_steps
            if not self.precision.startswith("16-"):  # with float16's loss scale that is part of the game
                rank_zero_warn(
                    "The gradients held inf or NaN: DeepSpeed skipped this optimizer step. Lower the learning rate, or "
                    "find the operation with Trainer(detect_anomaly=True)."
                )
        return result


def _step(engine: Any, frozen: set[int], changes: list[Callable[[Tensor], Any]]) -> None:
    """The engine's step, with changes to the reduced, unscaled fp32 gradients: a partition each."""
    if not frozen and not changes:
        engine.step()
        return

    # Not by their numbers: stages 1 and 2 step one group at a time
    passed_over = [engine.basic_optimizer.param_groups[number] for number in frozen]

    def change(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for partition in group["params"]:
                if any(group is other for other in passed_over):  # as without a gradient: no momentum, no decay
                    partition.grad = None
                elif partition.grad is not None:
                    for function in changes:
                        function(partition.grad)

    handle = engine.basic_optimizer.register_step_pre_hook(change)
    try:
        engine.step()
    finally:
        handle.remove()
