"""What a number of objects hold, to be put back exactly: every attribute, container and tensor that they lead to.

Each object stays the same object, so that whatever refers to it stays right. Values are kept in the host's memory, and
written back in place. It goes through containers and attributes, and stops at what is not part of the state of a
training: data sets and loaders, the Trainer and its strategy, loggers, functions, classes, process groups.
"""

from __future__ import annotations

import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_accel.hooks.tensors import tensors_in

__all__ = ["Snapshot"]

_LEFT_ALONE = (
    *(str, bytes, int, float, complex, type(None), type, weakref.ref, partial),
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.GeneratorType),
    *(Trainer, Strategy, Logger, Profiler, LightningDataModule),
    *(DataLoader, Dataset, CombinedLoader, _DataFetcher),
)
_ENTERED = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)  # whoever wrote them
_FOREIGN = ("torch._", "torch.distributed", "torch.cuda", "torch.utils.data", "threading", "multiprocessing", "logging")


class Snapshot:
    """The state of ``roots`` at this moment, with all that they lead to.

    Args:
        roots: Objects to go through.
        surfaces: Objects whose attributes are put back, but not what those hold.
        left: Objects to stop at, besides what is always left alone.
    """

    def __init__(self, roots: Iterable[Any], surfaces: Iterable[Any] = (), left: Iterable[Any] = ()) -> None:
        self._undo: list[Callable[[], Any]] = []
        self._seen: dict[int, Any] = {id(item): item for item in left}  # with references, so that no id is used twice
        for item in surfaces:
            self._keep_attributes(item)
            self._seen[id(item)] = item
        stack = list(roots)
        for root in stack:
            self._seen.pop(id(root), None)
        first = {id(root) for root in stack}
        while stack:
            value = stack.pop()
            if id(value) in self._seen or (not _is_state(value) and id(value) not in first):
                continue
            self._seen[id(value)] = value
            stack.extend(self._take(value))

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _take(self, value: Any) -> list[Any]:
        """Note how to put one value back; what it leads to."""
        if isinstance(value, Tensor):
            return self._take_tensor(value)
        if isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
            return []
        if isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
            return []
        if type(value).__module__.partition(".")[0] == "numpy":
            self._take_numpy(value)
            return []
        found: list[Any] = []
        if isinstance(value, dict):
            self._undo.append(partial(_refill, value, dict(value)))
            found += [*value.values(), *(key for key in value if isinstance(key, Tensor))]
        elif isinstance(value, (list, deque)):
            self._undo.append(partial(_refill_list, value, list(value)))
            found += value
        elif isinstance(value, set):
            self._undo.append(partial(_refill, value, set(value)))
            found += value
        elif isinstance(value, (tuple, frozenset)):
            found += value
        return found + self._keep_attributes(value)

    def _keep_attributes(self, value: Any) -> list[Any]:
        attributes = getattr(value, "__dict__", None)
        found: list[Any] = []
        if isinstance(attributes, dict):
            self._undo.append(partial(_refill, attributes, dict(attributes)))
            found += attributes.values()
        for cls in type(value).__mro__:
            names = vars(cls).get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if not name.startswith("__") and hasattr(value, name) and not isinstance(value, BaseException):
                    item = getattr(value, name)
                    self._undo.append(partial(_set_slot, value, name, item))
                    found.append(item)
        return found

    def _take_tensor(self, value: Tensor) -> list[Any]:
        found: list[Any] = []
        if value.is_leaf:
            gradient, requires = value.grad, value.requires_grad
            self._undo.append(partial(_set_gradient, value, gradient, requires))
            found.append(gradient)
        if attributes := getattr(value, "__dict__", None):
            self._undo.append(partial(_refill, attributes, dict(attributes)))
        for part in tensors_in(value):
            if part.device.type != "meta":
                self._undo.append(partial(_write, part, part.detach().to("cpu", copy=True)))
        return found

    def _take_numpy(self, value: Any) -> None:
        if hasattr(value, "bit_generator"):
            self._undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif hasattr(value, "get_state"):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif getattr(value, "ndim", 0) and value.flags.writeable:
            self._undo.append(partial(value.__setitem__, ..., value.copy()))


def _is_state(value: Any) -> bool:
    if isinstance(value, _ENTERED):
        return True
    if isinstance(value, (Tensor, torch.Generator, random.Random)):
        return True
    return not isinstance(value, _LEFT_ALONE) and not type(value).__module__.startswith(_FOREIGN)


def _refill(container: Any, items: Any) -> None:
    container.clear()
    container.update(items)


def _refill_list(container: Any, items: list[Any]) -> None:
    container.clear()
    container.extend(items)


def _set_slot(value: Any, name: str, item: Any) -> None:
    object.__setattr__(value, name, item)


def _set_gradient(value: Tensor, gradient: Tensor | None, requires_grad: bool) -> None:
    if value.requires_grad != requires_grad:
        value.requires_grad_(requires_grad)
    if value.grad is not gradient:
        value.grad = gradient


def _write(value: Tensor, saved: Tensor) -> None:
    for dim in range(value.dim()):
        if value.stride(dim) == 0 and value.size(dim) > 1:  # expanded: one number in many places
            value, saved = value.narrow(dim, 0, 1), saved.narrow(dim, 0, 1)
    with torch.inference_mode(value.is_inference()):
        value.detach().copy_(saved)
