"""The running statistics of batch norm, found anew at other weights, and put in the place of those of the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["batch_norms", "find_statistics_", "swap_buffers_"]


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of batch norm that gather statistics in the mode that they are in.

    Example:
        >>> list(batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())))
        ['1']
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
    }


def find_statistics_(layers: Mapping[str, _BatchNorm], steps: Iterable[Any]) -> dict[str, Tensor]:
    """Find the statistics over all ``steps`` alike, and leave the layers with them and without their momentum.

    Args:
        layers: By their names in the module.
        steps: Each runs the module forward on a batch when it is asked for.

    Returns:
        The buffers by name, on the CPU.
    """
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches
    for _ in steps if layers else ():
        pass
    return {
        f"{name}.{key}": buffer.to("cpu", copy=True)
        for name, layer in layers.items()
        for key, buffer in layer.named_buffers()
    }


def swap_buffers_(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put values into the buffers of those names, whether compiled or not; return what was there before."""
    buffers = {_plain(name): buffer for name, buffer in module.named_buffers()}
    before = {_plain(name): buffers[_plain(name)].clone() for name in values}
    for name, value in values.items():
        buffers[_plain(name)].copy_(value)
    return before


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")
