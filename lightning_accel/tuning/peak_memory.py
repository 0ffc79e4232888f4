"""The most memory that training takes at a time, and how much it may take: from CUDA's allocator, or counted."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_accel.hooks.memory import LiveBytes, storage_key
from lightning_accel.hooks.tensors import tensors_in

__all__ = ["CountedMemory", "CudaMemory", "format_bytes"]

_END: Any = object()


def format_bytes(count: int) -> str:
    """A number of bytes as people write it.

    Example:
        >>> format_bytes(3 * 2**29), format_bytes(700), format_bytes(50 * 2**20)
        ('1.5 GiB', '700 B', '50 MiB')
    """
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.3g} {unit}"
    return f"{count} B"


class CudaMemory:
    """What CUDA's allocator gave out at most. Too much of it is told after the fact, or by the device.

    Args:
        device: The device.
        budget: How many bytes training may take; None: what is free, with what this process holds already, and no more
            than torch lets it have (``torch.cuda.set_per_process_memory_fraction``).
        margin: The fraction of that which is left free.

    Attributes:
        total: Bytes that training may take.
        limit: The same without the margin.
    """

    def __init__(self, device: torch.device, budget: int | None, margin: float) -> None:
        self._device = device
        torch.cuda.empty_cache()
        held = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        fraction: Any = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        held = min(held, int(fraction * torch.cuda.get_device_properties(device).total_memory))
        self.total = held if budget is None else min(held, budget)
        self.limit = int(self.total * (1 - margin))

    def watch(self) -> AbstractContextManager[Any]:
        """A context in which it sees what happens."""
        return nullcontext()

    def begin(self) -> None:
        """Forget the peak so far."""
        torch.cuda.empty_cache()  # or what is left of smaller batches is in the way
        torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def peak(self) -> int:
        """The most bytes at a time since :meth:`begin`."""
        return torch.cuda.max_memory_allocated(self._device)

    def pass_on(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; nothing has to be done about them."""
        return batches

    def free(self) -> None:
        """Give back what nobody refers to any more."""
        gc.collect()
        torch.cuda.empty_cache()


class CountedMemory:
    """What operations made and what the model holds: for devices that do not say, or that run out late, as a CPU.

    Args:
        model: Tensors that are there from the start, each counted once.
        extra: Bytes that are there besides, and are no tensors.
        budget: How many bytes training may take.
        margin: The fraction of that which is left free.

    Attributes:
        total: Bytes that training may take.
        limit: The same without the margin; an operation that goes above it raises ``torch.OutOfMemoryError``.
    """

    def __init__(self, model: Iterable[Tensor], extra: int, budget: int, margin: float) -> None:
        held = list(tensors_in(list(model)))
        storages = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in held}
        self._base = sum(storages.values()) + extra
        self.total, self.limit = budget, int(budget * (1 - margin))
        self._live = LiveBytes(known=held)

    def watch(self) -> AbstractContextManager[Any]:
        """A context in which it sees what happens."""
        return self._live

    def begin(self) -> None:
        """Forget the peak so far, and hold what comes to the limit."""
        self._live.peak = self._live.now
        self._live.limit = self.limit - self._base

    @property
    def peak(self) -> int:
        """The most bytes at a time since :meth:`begin`."""
        return self._base + self._live.peak

    def pass_on(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, which count, wherever they were made, but not what they are made of."""
        while True:
            self._live.paused = True
            try:
                batch = next(batches, _END)
            finally:
                self._live.paused = False
            if batch is _END:
                return
            for tensor in tensors_in(batch):
                self._live.add(tensor)
            yield batch

    def free(self) -> None:
        """Give back what nobody refers to any more."""
        gc.collect()
