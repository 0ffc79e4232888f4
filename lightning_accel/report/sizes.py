"""How large things are: parameters, saved models, optimizer state, peak memory, and what they were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.hooks.tensors import tensors_in

__all__ = [
    "PeakMemory",
    "count_nonzeros",
    "count_parameters",
    "describe_environment",
    "optimizer_state_bytes",
    "state_dict_bytes",
    "tensor_bytes",
]


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of ``module``, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_nonzeros(module: nn.Module) -> int:
    """Return the number of parameters of ``module`` that are not zero, shared ones counted once."""
    return sum(int(parameter.detach().count_nonzero()) for parameter in module.parameters())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes behind ``tensors``; what several of them share is counted once."""
    seen: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        seen[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def optimizer_state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Return the bytes of every tensor that ``optimizers`` keep in their state, step counters included."""
    return tensor_bytes(tensor for optimizer in optimizers for tensor in tensors_in(optimizer.state))


class _Counter:
    """A file that keeps nothing but the number of bytes written, before and after zlib."""

    def __init__(self) -> None:
        self.written = 0
        self.compressed = 0
        self._zlib = zlib.compressobj(level=1)

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.written += size
        self.compressed += len(self._zlib.compress(data))
        return size

    def flush(self) -> None:
        self.compressed += len(self._zlib.flush(zlib.Z_SYNC_FLUSH))


def state_dict_bytes(module: nn.Module) -> tuple[int, int]:
    """Return the bytes of ``torch.save(module.state_dict())``, plain and compressed by zlib, without keeping them."""
    counter = _Counter()
    torch.save(module.state_dict(), counter)  # type: ignore[arg-type]  # torch asks for IO[bytes] but only writes
    counter.flush()
    return counter.written, counter.compressed


class PeakMemory:
    """The most memory in use between ``start`` and ``stop``, above what was in use at ``start``.

    On a CUDA device it is what torch allocated there. Otherwise it is the resident memory of this process: exact on
    Linux, where the kernel's high-water mark can be reset; elsewhere the mark covers the process's whole life, so that
    a peak below an earlier one reads 0.
    """

    def __init__(self) -> None:
        self.kind = "resident"
        self._base = 0

    def start(self, device: torch.device | None = None) -> None:
        """Note what is in use now and forget earlier peaks."""
        if device is not None and device.type == "cuda":
            self.kind = "cuda"
            torch.cuda.set_device(device)
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
            return
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # 5 resets the high-water mark, see proc(5)
        except OSError:
            pass
        self._base = _resident_peak()

    def stop(self) -> int:
        """Return the peak since ``start`` in bytes."""
        now = torch.cuda.max_memory_allocated() if self.kind == "cuda" else _resident_peak()
        return now - self._base


def _resident_peak() -> int:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def describe_environment() -> dict[str, str]:
    """Return the versions, hardware and settings that a time or a memory figure depends on."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("torch", "lightning", "lightning-accel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.get_device_name()}, {torch.cuda.device_count()} in all"
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
