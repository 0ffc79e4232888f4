"""Gradients averaged over ranks as DDP averages them, when it is asked for instead of in the backward.

Forward and backward then hold no collective operation, so that a rank that fails in them leaves no other one waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["GradientReducer"]

_BUCKET = 25 * 2**20  # bytes, as DDP's
_DENSE, _SPARSE = 1, 2


class GradientReducer:
    """Reduces the gradients of a module in DDP, whose own reduction is blocked.

    Args:
        model: DDP's wrapper.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self.model: Any = model  # its private methods have no types
        ignored = model.parameters_to_ignore
        self._parameters = [parameter for name, parameter in model.module.named_parameters() if name not in ignored]

    def before_forward(self) -> None:
        """Give every rank the buffers of the first, if DDP would do so in the forward that follows."""
        if self.model._check_sync_bufs_pre_fwd():
            self.model._sync_buffers()
            self.model.require_forward_param_sync = False

    def present(self) -> list[int]:
        """Which parameters have a gradient on this rank, as numbers whose largest says what some rank has."""
        return [0 if p.grad is None else _SPARSE if p.grad.is_sparse else _DENSE for p in self._parameters]

    @torch.no_grad()
    def reduce(self, present: Sequence[int]) -> None:
        """Average the gradients; a rank without one that others have takes part with zeros.

        Args:
            present: The largest of :meth:`present` over ranks.
        """
        dense: list[Tensor] = []
        for parameter, kind in zip(self._parameters, present, strict=True):
            if kind == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if kind == _SPARSE:
                self._reduce_sparse(parameter)
            else:
                dense.append(parameter.grad)
        share, group = 1.0 / self.model.process_group.size(), self.model.process_group
        for bucket in _buckets(dense):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).mul_(share)
            dist.all_reduce(flat, group=group)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            reduced = [part.view(gradient.shape) for part, gradient in zip(parts, bucket, strict=True)]
            torch._foreach_copy_(bucket, reduced)
        self.model.require_forward_param_sync = True  # as after a forward of DDP that is followed by a reduction

    def _reduce_sparse(self, parameter: Tensor) -> None:
        gradient: Any = parameter.grad
        if not gradient.is_sparse:
            gradient = gradient.to_sparse(1)
        gradient = (gradient * (1.0 / self.model.process_group.size())).coalesce()
        dist.all_reduce(gradient, group=self.model.process_group)
        parameter.grad = gradient


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in groups of one kind, each of no more bytes than a bucket has, but for single ones."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for same in kinds.values():
        bucket: list[Tensor] = []
        nbytes = 0
        for gradient in same:
            if bucket and nbytes + gradient.nbytes > _BUCKET:
                yield bucket
                bucket, nbytes = [], 0
            bucket.append(gradient)
            nbytes += gradient.nbytes
        yield bucket
