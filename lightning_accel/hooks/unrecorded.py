"""Forward passes that leave nothing behind but gradients: no logged values, no counts of metrics, no running means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

__all__ = ["unrecorded"]


class _Unlogged(_ResultCollection):
    """Takes what ``self.log`` gives, and keeps nothing."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


@contextmanager
def unrecorded(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Let training steps inside log nothing, and put back what they change in metrics and buffers.

    Buffers are the running statistics of batch norm, but also whatever else a module keeps in them.

    Args:
        trainer: The Trainer, in the middle of a training batch.
        pl_module: The module that is trained.
    """
    loop, modules = trainer.fit_loop.epoch_loop, list(pl_module.modules())
    results = loop._results
    metrics = [(item, dict(vars(item))) for item in modules if isinstance(item, (Metric, MetricCollection))]
    buffers = [(module, name, value) for module in modules for name, value in module._buffers.items()]
    values = [None if value is None else value.detach().clone() for _, _, value in buffers]
    try:
        loop._results = _Unlogged(training=True)
        for metric, _ in metrics:
            if isinstance(metric, Metric):
                _start_afresh(metric)
        yield
    finally:
        loop._results = results
        for metric, attributes in metrics:
            vars(metric).clear()
            vars(metric).update(attributes)
        _put_back(buffers, values)


def _start_afresh(metric: Metric) -> None:
    """Give a metric new states; ``reset`` would empty the lists among the old ones."""
    for name, default in metric._defaults.items():
        setattr(metric, name, default.detach().clone().to(metric.device) if isinstance(default, Tensor) else [])


@torch.no_grad()
def _put_back(buffers: list[tuple[nn.Module, str, Tensor | None]], values: list[Tensor | None]) -> None:
    for (module, name, buffer), value in zip(buffers, values, strict=True):
        module._buffers[name] = buffer
        if buffer is not None and value is not None:
            buffer.copy_(value)
