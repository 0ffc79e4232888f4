"""Running out of memory: which errors say so, and how many bytes live, with a limit that makes it happen anywhere."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "is_out_of_memory", "storage_key"]

_MESSAGES = (
    "out of memory",  # of CUDA, MPS and XPU
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: less at a time could still fit.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")), is_out_of_memory(RuntimeError("shapes"))
        (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves these without types
    """Counts the bytes that operations make and that are still there, while this context is entered.

    Every operation is seen as it runs, those of the backward pass as well, and each storage that it made is counted
    until it is let go of. It works on any device. What one operation allocates and frees inside itself is not seen, nor
    what a compiled graph does: it is counted when it comes out.

    Args:
        limit: Bytes that may be there at a time; an operation that makes more raises ``torch.OutOfMemoryError``. None:
            any number.
        known: Tensors that are not counted, such as the parameters, where operations write into them.

    Attributes:
        paused: Whether operations go by that are not looked at, such as those of a loader and its forked workers.
        now: Bytes that are there.
        peak: The most bytes at a time.

    Example:
        >>> x = torch.ones(8)
        >>> with LiveBytes() as live:
        ...     y = (x + 1).exp()
        >>> live.now, live.peak
        (32, 64)
    """

    def __init__(self, limit: int | None = None, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.paused = limit, False
        self.now = self.peak = 0
        self._known = list(known)  # with references, or the keys could be those of other storages
        self._own = {storage_key(tensor) for tensor in self._known}
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        if self.limit is not None and self.now > self.limit:
            raise torch.OutOfMemoryError(f"out of memory: {self.now:,} bytes are in use, and {self.limit:,} allowed.")
        return out

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether ``torch.compile`` goes on compiling while this is entered; without it, it would run eagerly."""
        return True

    def add(self, tensor: Tensor) -> bool:
        """Count the memory behind a tensor, once, until it is gone; return whether it is counted now first."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._own or key in self._live:
            return False
        nbytes = storage.nbytes()
        self._live[key] = weakref.ref(storage, partial(self.remove, key)), nbytes
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        return True

    def remove(self, key: int, _: Any = None) -> int:
        """Count a storage no longer; return its bytes, or 0 where it was not counted."""
        _, nbytes = self._live.pop(key, (None, 0))
        self.now -= nbytes
        return nbytes


def storage_key(tensor: Tensor) -> int:
    """What two tensors have in common if, and only if, they share memory; ``data_ptr`` is 0 where there is none."""
    key: int = tensor.untyped_storage()._cdata
    return key
