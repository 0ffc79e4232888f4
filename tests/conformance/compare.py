"""Comparing what two runs left: nested states bit for bit, and weights up to a tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["assert_close", "assert_equal", "differences"]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """The paths at which two nested states are not equal bit for bit."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} against {type(b).__name__}"]
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return [f"{path}: {tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}"]
        same = torch.equal(_bits(a), _bits(b))
        return [] if same else [f"{path}: largest difference {(a.double() - b.double()).abs().max().item():.3g}"]
    if isinstance(a, Mapping):
        lone = [f"{path}.{key}: only on one side" for key in sorted(map(str, set(a) ^ set(b)))]
        return lone + [item for key in a if key in b for item in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} items against {len(b)}"]
        return [item for i, (x, y) in enumerate(zip(a, b, strict=True)) for item in differences(x, y, f"{path}[{i}]")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r} against {b!r}"]


def _bits(tensor: Tensor) -> Tensor:
    """Bits, so that NaN equals NaN and 0.0 is not -0.0."""
    return tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor.flatten()


def assert_equal(a: Any, b: Any, what: str) -> None:
    """Fail with the first paths that are not equal bit for bit."""
    found = differences(a, b)
    assert not found, f"{what}: {len(found)} differences, first {found[:5]}"


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    """Fail if weights are further apart than ``tolerance``."""
    assert a.keys() == b.keys(), f"{what}: other names"
    far = {name: (a[name].double() - b[name].double()).abs().max().item() for name in a}
    name = max(far, key=lambda name: far[name])
    assert far[name] <= tolerance, f"{what}: {name} differs by {far[name]:.3g}, more than {tolerance:g}"
