"""SecondPass: the forwards and backwards of an optimizer step once more, with the same batches and random draws.

It runs inside the closure, after the first pass and before ``on_before_optimizer_step`` and clipping, and only the
gradients are new after it: logs, metrics, buffers and the random state are those that the first pass left. The hooks
around a backward (``on_before_backward``, ``on_after_backward``) are called again, since they may change a gradient;
those of the batch, of the optimizer and ``on_before_zero_grad`` are not.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_accel.hooks.callback import AccelCallback, trainer_callbacks
from lightning_accel.hooks.data import window_is_open
from lightning_accel.hooks.resume import gather_states
from lightning_accel.hooks.rng import get_rng_state, set_rng_state
from lightning_accel.hooks.tensors import tensors_in
from lightning_accel.hooks.unrecorded import unrecorded
from lightning_accel.hooks.window import AccumulationWindow

__all__ = ["SecondPass"]


@dataclass
class MicroBatch:
    """What one forward and backward started from."""

    arguments: Any
    """Of ``training_step``, in containers of their own: it may change those that it gets."""
    random_state: dict[str, Any]
    count: Tensor | None
    """How much it weighs in its window; None where all weigh the same."""
    versions: list[tuple[Tensor, int]]
    """How often each tensor in it had been changed in place."""


class SecondPass:
    """Runs the forwards and backwards of some optimizer steps once more.

    Until the window of a step is complete, its batches stay in memory, where they are.

    Args:
        callback: Whose changes these are.
        trainer: The Trainer.
        pl_module: Its module.
        is_due: Asked at the start of each window whether its step is to have a second pass.
        around: Called with the optimizer and a function that makes the second pass, when the first one is done: it may
            change the weights before, must put them back after, and may leave the second pass out.

    Raises:
        MisconfigurationException: If batches can't be used again.
    """

    def __init__(
        self,
        callback: AccelCallback,
        trainer: Trainer,
        pl_module: LightningModule,
        is_due: Callable[[], bool],
        around: Callable[[Optimizer, Callable[[], None]], None],
    ) -> None:
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"{type(callback).__name__} needs each batch twice, but `training_step` takes a `dataloader_iter` and "
                "fetches the batches by itself: give it the signature `training_step(self, batch, batch_idx)`."
            )
        self._name = type(callback).__name__
        self._trainer, self._module = trainer, pl_module
        self._is_due, self._around = is_due, around
        self._windows: list[AccumulationWindow] = [
            other
            for other in trainer_callbacks(trainer)
            if isinstance(other, AccumulationWindow) and not other.is_neutral
        ]
        self._kept: list[MicroBatch] = []
        self._due: bool | None = None  # whether the present window is to have one; None before the first one
        callback.patch(trainer.fit_loop.epoch_loop.automatic_optimization, "_make_closure", self._make_closure)

    def check_optimizer(self) -> None:
        """Refuse an optimizer that evaluates the loss several times in a step; call it when training starts.

        Raises:
            MisconfigurationException: With the way out.
        """
        if any(isinstance(optimizer, LBFGS) for optimizer in self._trainer.optimizers):
            raise self._refusal("LBFGS")

    def _refusal(self, optimizer: str) -> MisconfigurationException:
        return MisconfigurationException(
            f"{self._name} can't work with {optimizer}, which evaluates the loss several times in a step and expects "
            "its own gradient: use an optimizer that takes one gradient a step, such as SGD or AdamW."
        )

    # -------------------------------------------------------------------------------------------------------- passes

    def _make_closure(self, original: Any, arguments: Any, optimizer: Optimizer, batch_idx: int) -> Any:
        closure = original(arguments, optimizer, batch_idx)
        if closure._backward_fn is None:
            return closure
        if closure._zero_grad_fn is not None:  # the first one of a window
            self._kept.clear()
            self._due = self._is_due()
        elif self._due is None:
            self._due = False
            if self._is_due():
                rank_zero_warn(
                    f"The checkpoint was saved inside an accumulation window without the batches that {self._name} "
                    "kept of it: the step of this window is made with the first gradient, as without it."
                )
        if self._due:
            first = closure.closure

            def both() -> Any:
                if closure._result is not None:
                    raise self._refusal(type(optimizer).__name__)
                return self._both(first, arguments, optimizer, batch_idx)

            closure.closure = both
        return closure

    def _both(self, first: Callable[[], Any], arguments: Any, optimizer: Optimizer, batch_idx: int) -> Any:
        micro_batch = MicroBatch(
            arguments=_own_containers(arguments),
            random_state=get_rng_state(),
            count=next((window.present_count for window in self._windows), None),
            versions=_versions(arguments),
        )
        result = first()
        if result.closure_loss is not None:  # or there was no backward
            self._kept.append(micro_batch)
        if self._kept and not window_is_open(self._trainer):
            self._around(optimizer, lambda: self._again(optimizer, batch_idx))
            self._kept.clear()
        return result

    def _again(self, optimizer: Optimizer, batch_idx: int) -> None:
        """Make the second pass over the window."""
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop.automatic_optimization
        random_state = get_rng_state()
        try:
            with unrecorded(trainer, self._module), torch.enable_grad():
                call._call_lightning_module_hook(
                    trainer, "optimizer_zero_grad", trainer.current_epoch, batch_idx, optimizer
                )
                for number, item in enumerate(self._kept, start=1):
                    self._check_unchanged(item)
                    set_rng_state(item.random_state)
                    with ExitStack() as stack:
                        # as in the first pass: ranks exchange gradients in the last backward only
                        open_window = number < len(self._kept)
                        stack.enter_context(_block_parallel_sync_behavior(trainer.strategy, block=open_window))
                        for window in self._windows:
                            stack.enter_context(window.repeating(item.count))
                        loss = loop._training_step(item.arguments).closure_loss
                        if loss is not None:
                            call._call_strategy_hook(trainer, "backward", loss, optimizer)
        finally:
            set_rng_state(random_state)

    def _check_unchanged(self, item: MicroBatch) -> None:
        if any(tensor._version != version for tensor, version in item.versions):
            raise MisconfigurationException(
                f"{self._name} needs each batch twice, but `training_step` (or a hook) changes a tensor of it in "
                "place: make a new one there, `x = x / 255` in the place of `x /= 255`."
            )

    # -------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """The batches of an open window, of every rank: for a checkpoint that all ranks are saving."""
        if not self._kept:
            return {}
        ranks = gather_states(self._trainer, self._pack())
        return {} if any(item is None for item in ranks) else {"ranks": ranks}

    def _pack(self) -> Tensor | None:
        """The batches as bytes: a checkpoint is to be readable whatever classes they are made of."""
        buffer = io.BytesIO()
        items = [(dict(item.arguments), item.random_state, item.count) for item in self._kept]
        try:
            torch.save(items, buffer)
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
            known = re.search(r"GLOBAL (\S+)", str(error))
            rank_zero_warn(
                f"The checkpoint is saved inside an accumulation window, whose batches {self._name} needs again, but "
                f"they can't be loaded with weights_only=True ({known[1] if known else error}): a run resumed from it "
                "makes the step of this window with the first gradient, as without it. Make batches of tensors, or "
                "name their classes in `torch.serialization.add_safe_globals`."
            )
            return None
        return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the batches of the window that a checkpoint was saved in; call it when training starts."""
        ranks = state.get("ranks", [])
        if len(ranks) != self._trainer.world_size:
            return  # said when the window goes on
        device = self._trainer.strategy.root_device
        packed = io.BytesIO(ranks[self._trainer.global_rank].numpy().tobytes())
        for arguments, random_state, count in torch.load(packed, map_location="cpu", weights_only=True):
            arguments = move_data_to_device(arguments, device)
            self._kept.append(MicroBatch(arguments, random_state, count, _versions(arguments)))
        self._due = True


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    return [(tensor, tensor._version) for tensor in tensors_in(value) if not tensor.is_inference()]


def _own_containers(value: Any) -> Any:
    """``value`` with containers of its own, around the same tensors and other objects."""
    if isinstance(value, tuple):
        items = [_own_containers(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_own_containers(item) for item in value]
    if isinstance(value, MutableMapping):
        own = copy.copy(value)
        for key, item in value.items():
            own[key] = _own_containers(item)
        return own
    return value
