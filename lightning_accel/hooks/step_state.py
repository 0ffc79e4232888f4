"""What the step of a batch changes, to be put back if it fails half way: so that the same batch can run again.

Kept at every batch, so only what a step is known to change: the random number generators, buffers (running statistics),
the state of metrics, counters and lists on modules that are not torch's own, and the gradients of earlier batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.hooks.rng import keep_rng

__all__ = ["StepState"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SMALL = 4096  # elements of a tensor that is a plain attribute: larger ones are data


class StepState:
    """What a step may change in a module.

    Args:
        module: The module; its submodules are looked up now.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        every = list(module.modules())
        self._with_buffers = [part for part in every if part._buffers]
        self._own = [part for part in every if not type(part).__module__.startswith("torch.nn.")]
        self._restore_rng: Callable[[], None] | None = None
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []
        self._buffers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._copies = _Copies()
        self._gradients: dict[Tensor, tuple[Tensor, Tensor]] | None = None

    def keep(self) -> None:
        """Remember everything but gradients, as it is now."""
        self._restore_rng = keep_rng()
        self._attributes = [(vars(part), dict(vars(part))) for part in self._own]
        self._contents = []
        for _, attributes in self._attributes:
            for name in attributes.keys() - _OF_EVERY_MODULE:
                self._contents.extend(_contents(attributes[name]))
        self._buffers = [(part._buffers, dict(part._buffers)) for part in self._with_buffers]
        self._copies.take(buffer for _, buffers in self._buffers for buffer in buffers.values() if buffer is not None)
        self._gradients = None

    def keep_gradients(self, optimizer: Optimizer) -> None:
        """Remember the gradients that are there before the first backward; a second call does nothing."""
        if self._gradients is None:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            found = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
            self._gradients = {parameter: (gradient, gradient.clone()) for parameter, gradient in found}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; gradients of this batch are let go of."""
        assert self._restore_rng is not None
        self._restore_rng()
        for attributes, before in (*self._attributes, *self._buffers):
            attributes.clear()
            attributes.update(before)
        for value, before in self._contents:
            _refill(value, before)
        self._copies.restore()
        if self._gradients is not None:  # or no backward was begun
            for parameter in self._module.parameters():
                kept = self._gradients.get(parameter)
                parameter.grad = None if kept is None else kept[0].copy_(kept[1])


class _Copies:
    """Copies of tensors, whose memory is used again as long as the tensors are the same ones."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        self._same: list[Any] = []

    @torch.no_grad()
    def take(self, tensors: Iterable[Tensor]) -> None:
        found = list(tensors)
        same = [(id(tensor), tensor.shape) for tensor in found]
        if same != self._same:
            self._same, self._pairs = same, {}
            for tensor in found:
                own, copies = self._pairs.setdefault((tensor.device, tensor.dtype), ([], []))
                own.append(tensor)
                copies.append(torch.empty_like(tensor))
        for own, copies in self._pairs.values():
            torch._foreach_copy_(copies, own)

    def restore(self) -> None:
        for own, copies in self._pairs.values():
            torch._foreach_copy_(own, copies)


def _contents(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a value holds that can change while it stays the same object, with a copy."""
    if isinstance(value, Tensor):
        if value.numel() <= _SMALL and not isinstance(value, nn.Parameter):
            yield value, value.detach().clone()
    elif isinstance(value, (list, deque)):
        yield value, list(value)
    elif isinstance(value, set):
        yield value, set(value)
    elif isinstance(value, dict):
        yield value, dict(value)
        for item in value.values():
            if isinstance(item, (list, deque, set, dict)):
                yield from _contents(item)


def _refill(value: Any, before: Any) -> None:
    if isinstance(value, Tensor):
        value.detach().copy_(before)
        return
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(before)
    else:
        value.update(before)
