"""The loops of :mod:`lightning_accel.optimizers.codes` in C, compiled where there is a compiler, or in Triton on CUDA.

They give the same bits as the tensor operations of that module, so that a run may go on where there is none: only the
time differs. The library is kept in a folder of the user's own in the temporary directory, under a name that tells the
source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["address", "compiler", "kernels", "triton_for", "triton_on", "why_no_triton", "without_kernels"]

_FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-std=gnu11",
)
_SOURCE = Path(__file__).with_name("kernels.c")
_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
_ARGUMENTS: dict[str, list[Any]] = {
    "decode_bytes": [_POINTER] * 4 + [_LONG],
    "encode_bytes": [_POINTER] * 4 + [_LONG, _FLOAT, _FLOAT, _FLOAT, _INT, _INT],
    "encode_fp8": [_POINTER] * 4 + [_LONG, _FLOAT, _INT],
    "decode_nibbles": [_POINTER] * 4 + [_LONG],
    "encode_nibbles": [_POINTER] * 4 + [_LONG, _FLOAT, _POINTER, _INT],
    "encode_bfloat16": [_POINTER] * 3 + [_LONG],
    "decode_bfloat16": [_POINTER] * 2 + [_LONG],
}
without_kernels = False
"""Set to True to use tensor operations alone."""


def address(tensor: torch.Tensor) -> int:
    """Where a tensor's elements begin in memory."""
    return tensor.data_ptr()


def compiler() -> str:
    """The path of a C compiler that takes the options of gcc, or an empty string."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((path for path in map(shutil.which, filter(None, names)) if path), "")


def kernels() -> Any:
    """The compiled library, or None where it can't be had."""
    return None if without_kernels else _load()


def triton_for(*tensors: torch.Tensor) -> Any:
    """The kernels in Triton, where they can take these tensors, or None."""
    return triton_on(tensors[0].device) if all(tensor.dtype is torch.float32 for tensor in tensors) else None


def triton_on(device: torch.device) -> Any:
    """The kernels in Triton, where they run on a device, or None."""
    return None if device.type != "cuda" or without_kernels else _triton(device)[0]


def why_no_triton(device: torch.device) -> str:
    """Why there are no kernels in Triton on a CUDA device, or an empty string."""
    return "" if triton_on(device) is not None else "without_kernels is set" if without_kernels else _triton(device)[1]


@functools.cache
def _triton(device: torch.device) -> tuple[Any, str]:
    """The kernels, if one of them runs on a device: Triton needs a C compiler too, and a device that it knows."""
    try:
        from lightning_accel.optimizers import triton_kernels

        line = torch.ones(256, device=device)
        codes, scales = torch.empty(256, dtype=torch.uint8, device=device), torch.empty(1, device=device)
        triton_kernels.encode(line, codes, scales, torch.zeros(256, dtype=torch.int32, device=device), 8, False)
        return (triton_kernels, "") if int(codes[-1]) == 255 else (None, "its results are wrong")
    except ImportError:
        return None, "Triton is not installed"
    except Exception as error:  # whatever it fails with, there are tensor operations
        return None, f"Triton fails with {type(error).__name__}: {error}".splitlines()[0]


@functools.cache
def _load() -> Any:
    path = compiler()
    if not path or os.name != "posix":
        return None
    try:
        library = ctypes.CDLL(str(_compile(path)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _compile(path: str) -> Path:
    source = _SOURCE.read_bytes()
    told = subprocess.run([path, "--version"], capture_output=True, timeout=20, check=True).stdout
    key = hashlib.sha256(b"\0".join([source, told, " ".join(_FLAGS).encode(), _processor()])).hexdigest()[:20]
    folder = Path(tempfile.gettempdir(), f"lightning_accel_kernels_{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to somebody else")  # who could put any code there
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, library.name)
            command = [path, *_FLAGS, "-o", str(made), str(_SOURCE)]
            subprocess.run(command, capture_output=True, timeout=120, check=True)
            os.replace(made, library)  # at once: other ranks may be doing the same
    return library


def _processor() -> bytes:
    """What tells processors with other instructions apart."""
    try:
        with open("/proc/cpuinfo", "rb") as lines:
            return b"".join(next(([line] for line in lines if line.startswith((b"flags", b"Features"))), []))
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}".encode()
