"""The step of one batch in micro-batches: what Lightning's closure does for a batch, done for each part of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.memory import recursive_detach
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_accel.hooks.callback import AccelCallback
from lightning_accel.hooks.reduction import GradientReducer
from lightning_accel.hooks.step_logs import StepLogs

__all__ = [
    "MicroBatch",
    "MicroStep",
    "SplitClosure",
    "check_model",
    "reducer_of",
    "replace_closures",
    "steps_together",
    "why_not_auto",
]


class MicroBatch(NamedTuple):
    """A part of a batch."""

    batch: Any
    samples: int
    weight: float
    """What its loss is multiplied by: its share of the batch."""


class SplitClosure(Closure):
    """In place of Lightning's closure: calls a function that makes the whole step, and keeps what it returns.

    Args:
        run: Goes forward and backward; returns the batch's loss and the step's other outputs.
    """

    def __init__(self, run: Callable[[], tuple[Tensor | None, dict[str, Any]]]) -> None:
        super().__init__(step_fn=self._result_of(run))

    @staticmethod
    def _result_of(run: Callable[[], tuple[Tensor | None, dict[str, Any]]]) -> Callable[[], ClosureResult]:
        def step() -> ClosureResult:
            loss, extra = run()
            return ClosureResult(loss, extra=extra)

        return step

    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        """Make the step."""
        return self._step_fn()


class MicroStep:
    """Forward and backward of one batch, in parts, through the hooks that Lightning would call.

    Gradients are zeroed where Lightning would zero them: after the first forward, if the batch begins a window.

    Args:
        trainer: The Trainer.
        kwargs: What ``training_step`` gets, by name; ``"batch"`` is replaced by each part.
        optimizer: The optimizer.
        batch_idx: The number of the batch in the epoch.
    """

    def __init__(self, trainer: Trainer, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int) -> None:
        self._trainer, self._kwargs = trainer, kwargs
        self.batch_idx = batch_idx
        self._loop = trainer.fit_loop.epoch_loop.automatic_optimization
        self._zero_grad = self._loop._make_zero_grad_fn(batch_idx, optimizer)
        self._backward = self._loop._make_backward_fn(optimizer)
        # Where the whole batch waits for others, Lightning blocks the reduction around the closure
        self.reduces = not trainer.fit_loop._should_accumulate()
        """Whether gradients are reduced across ranks in this batch."""
        self.logs = StepLogs(trainer)
        """What was logged in it."""

    def run(
        self, parts: Sequence[MicroBatch], *, reduce: bool = True, ready: Callable[[], None] | None = None
    ) -> list[ClosureResult]:
        """Go forward and backward with each part; gradients are reduced across ranks in the last one.

        Args:
            parts: The parts.
            reduce: False: gradients are not reduced.
            ready: Called when gradients are zeroed, or are to be added to, before the first backward.

        Returns:
            What Lightning makes of what the step returned for each; of several, without graphs. It knows no weights.
        """
        results: list[ClosureResult] = []
        with self.logs.held():
            for number, part in enumerate(parts):
                self.logs.part = number
                block = self.reduces and (number + 1 < len(parts) or not reduce)
                with _block_parallel_sync_behavior(self._trainer.strategy, block=block):
                    result = self._run(part, ready if number == 0 else None)
                if len(parts) > 1:
                    result.extra = recursive_detach(result.extra)
                results.append(result)
            if not parts:
                self._zero()
        return results

    def _run(self, part: MicroBatch, ready: Callable[[], None] | None) -> ClosureResult:
        result = self._loop._make_step_fn(OrderedDict(self._kwargs, batch=part.batch))()
        self._zero()
        if ready is not None:
            ready()
        if self._backward is not None and result.closure_loss is not None:
            self._backward(result.closure_loss if part.weight == 1 else result.closure_loss * part.weight)
        result.closure_loss = None
        return result

    def _zero(self) -> None:
        function, self._zero_grad = self._zero_grad, None
        if function is not None:
            function()


def replace_closures(callback: AccelCallback, trainer: Trainer, make: Callable[..., Any]) -> None:
    """Let ``make(original, kwargs, optimizer, batch_idx)`` make the closure of each batch, until the fit is over."""
    callback.patch(trainer.fit_loop.epoch_loop.automatic_optimization, "_make_closure", make)


def steps_together(trainer: Trainer) -> bool:
    """Whether forward and backward wait for other ranks, so that all ranks need equally many of them."""
    if trainer.world_size == 1:
        return False
    model: Any = trainer.model
    is_ddp = isinstance(model, DistributedDataParallel)
    return not is_ddp or any(isinstance(layer, SyncBatchNorm) for layer in model.modules())


def why_not_auto(trainer: Trainer) -> str:
    """Why a step can't be made again where it failed on one rank, with the way out; empty where it can.

    Args:
        trainer: The Trainer, before or after its strategy has set up the model.
    """
    strategy, way_out = trainer.strategy, "Set `size` to a number: see how many samples fit, and take a few less."
    has_ddp = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)  # a subclass
    if not has_ddp and not isinstance(strategy, SingleDeviceStrategy):
        return (
            f"can't work with {type(strategy).__name__}: its forward and backward have collective operations inside, "
            f"so that the other ranks would wait for the one whose memory ran out. {way_out}"
        )
    if not isinstance(strategy, DDPStrategy) or trainer.world_size == 1:
        return ""  # one rank waits for none
    model: Any = trainer.model
    layers = () if model is None else model.modules()
    if any(isinstance(layer, SyncBatchNorm) for layer in layers) or getattr(strategy, "_layer_sync", None) is not None:
        return (
            "can't work with SyncBatchNorm on several ranks, whose forward waits for the others: they would wait for "
            f"the one whose memory ran out. {way_out} Or use GroupNorm."
        )
    if strategy._ddp_comm_hook is not None or getattr(model, "_comm_hooks", None):
        return f"can't work with a communication hook of DDP: it reduces gradients by itself. {way_out}"
    if strategy._ddp_kwargs.get("mixed_precision") is not None:
        return f"can't work with DDP's own mixed precision: it reduces gradients in the backward. {way_out}"
    return ""


def check_model(trainer: Trainer, name: str) -> None:
    """Refuse what several backwards in a step can't work with, once the model is set up."""
    model: Any = trainer.model
    if getattr(model, "zenflow", False):  # of a DeepSpeed engine
        raise MisconfigurationException(
            f"{name} can't work with ZenFlow, which has windows of its own (`update_interval`): remove one of them."
        )
    if getattr(model, "static_graph", False):  # of DDP's wrapper
        raise MisconfigurationException(
            f"{name} can't work with DDPStrategy(static_graph=True), which counts the backwards of its first step: "
            "leave `static_graph` out."
        )


def reducer_of(trainer: Trainer, reducer: GradientReducer | None) -> GradientReducer | None:
    """The reducer of this run's DDP: the present one, as long as it is for the same wrapper; None without DDP."""
    model = trainer.strategy.model
    if not isinstance(model, DistributedDataParallel):
        return None
    return reducer if reducer is not None and reducer.model is model else GradientReducer(model)
