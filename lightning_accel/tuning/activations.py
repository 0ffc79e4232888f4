"""What one training step keeps for its backward pass, and the most that it has at a time.

Every operation is seen as it runs (``TorchDispatchMode``), and each storage that it made is counted until it is let go
of. Unlike hooks on what autograd saves, this sees what activation checkpointing keeps, and what it makes once more in
the backward pass. It works on tensors with shapes and no memory as on real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_accel.hooks.memory import LiveBytes, storage_key

__all__ = ["LiveTensors"]


class LiveTensors(LiveBytes):
    """Counts the bytes that operations make while this context is entered; it may be entered several times.

    Args:
        module: Its parameters, their gradients and its buffers are not counted.

    Attributes:
        kept: Bytes that were there when :meth:`forward_is_over` was called, without ``casts``; the most of them if it
            was called several times.
        casts: Of these, copies of parameters in another dtype, which autocast makes. A strategy that casts the
            parameters itself (FSDP2's mixed precision) has none.
        frozen_inputs: Bytes that were gone by then, of inputs of linear layers with a frozen weight: their backward
            pass needs the weight alone, but DeepSpeed's stage 3 keeps the inputs of all linear layers.
        peak: The most bytes at a time, all together.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> with LiveTensors(net) as live:
        ...     loss = net(torch.ones(2, 4)).sum()
        >>> live.forward_is_over()
        >>> live.kept  # the input (2, 4), what ReLU returned (2, 8), and the loss
        100
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(known=(*module.parameters(), *module.buffers()))
        self.kept = self.casts = self.frozen_inputs = 0
        self._casts: dict[int, int] = {}  # the bytes of those that are there, by key
        self._frozen_inputs: set[int] = set()  # the keys of those that are there
        for part in module.modules():
            if isinstance(part, nn.Linear) and not part.weight.requires_grad:
                part.register_forward_pre_hook(self._note_input)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._forget_gradient)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and storage_key(args[0]) in self._own
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self.add(tensor) and is_cast and tensor.dtype != args[0].dtype:
                self._casts[storage_key(tensor)] = tensor.untyped_storage().nbytes()
        return out

    def forward_is_over(self) -> None:
        """Note what there is now: the backward pass begins."""
        if self.now >= self.kept + self.casts:
            self.casts = sum(self._casts.values())
            self.kept = self.now - self.casts
        self._frozen_inputs.clear()

    def remove(self, key: int, _: Any = None) -> int:
        """Count a storage no longer; of an input of a frozen layer, note that it was there."""
        nbytes = super().remove(key)
        self._casts.pop(key, None)
        if key in self._frozen_inputs:
            self._frozen_inputs.remove(key)
            self.frozen_inputs += nbytes
        return nbytes

    def _note_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].requires_grad and storage_key(args[0]) in self._live:
            self._frozen_inputs.add(storage_key(args[0]))

    def _forget_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.remove(storage_key(parameter.grad))
