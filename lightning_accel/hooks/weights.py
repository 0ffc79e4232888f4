"""Weights of the micro-batches of a window, by how many samples or tokens their losses are means of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_accel.hooks.batch_size import batch_size_of
from lightning_accel.hooks.data import train_loaders

__all__ = ["WindowWeights", "largest_over_ranks", "samples_of_a_batch", "sum_over_ranks"]


def sum_over_ranks(trainer: Trainer, value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; a collective operation."""
    if trainer.world_size == 1:
        return value
    total = value.detach().clone().to(trainer.strategy.root_device)
    reduced: Tensor = trainer.strategy.reduce(total, reduce_op="sum")
    return reduced


def largest_over_ranks(trainer: Trainer, values: Sequence[int]) -> list[int]:
    """Of each number the largest that any rank has; a collective operation."""
    if trainer.world_size == 1:
        return list(values)
    found = torch.tensor(values, device=trainer.strategy.root_device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def samples_of_a_batch(trainer: Trainer, *, agree: bool) -> int | None:
    """How many samples one batch of each rank has, over all ranks that have data of their own.

    Args:
        trainer: The Trainer.
        agree: Whether to ask the other ranks, which is a collective operation, or to take them to be like this one.

    Returns:
        None where a loader does not say how large its batches are, or there are several.
    """
    loaders = train_loaders(trainer)
    own = batch_size_of(loaders[0]) if len(loaders) == 1 else None
    replicas = int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))
    if not agree:
        return None if own is None else own * replicas
    total, unknown = sum_over_ranks(trainer, torch.tensor([own or 0, own is None])).tolist()
    return None if unknown else total * replicas // trainer.world_size


class WindowWeights:
    """What each loss of a window is multiplied by, and what its gradient is multiplied by in the end.

    With gradients g of means over n samples or tokens each, one big batch over all W ranks has the gradient sum(n g)/N.
    N is known only at the end. So each loss is multiplied by n/R, with any R that all ranks share; a window of L
    divides each by L, and W ranks take the mean; what is left in the end is the factor R W L/N. With R near to n the
    losses keep their size, which matters in float16.

    Attributes:
        reference: R: the mean count of a micro-batch in the last window, or at first that of the first micro-batches.
        counted: This rank's part of N so far.
        count: n of the present micro-batch; None before the first one.
    """

    def __init__(self) -> None:
        self.reference = 0.0
        self.counted: Tensor = torch.tensor(0)
        self.count: Tensor | None = None
        self._is_counted = False  # whether it is part of N: a batch may go backward several times

    def take(self, trainer: Trainer, count: Tensor, *, first: bool) -> None:
        """Take in the count of a micro-batch that is about to run; a collective operation where there is no R yet.

        Args:
            trainer: The Trainer.
            count: Its count, on its own device.
            first: Whether it is the first of its window.
        """
        self.count, self._is_counted = count, False
        if first:
            self.counted = torch.zeros_like(count)
            # One rank shares it with none: a window of one micro-batch then is that batch, bit for bit
            if not self.reference or trainer.world_size == 1:
                self.reference = float(sum_over_ranks(trainer, count)) / trainer.world_size or 1.0

    def weigh(self, loss: Tensor) -> Tensor:
        """The loss of the micro-batch with its weight; its count is now part of the window's."""
        assert self.count is not None
        if not self._is_counted:
            self.counted = self.counted.to(self.count.device) + self.count
        self._is_counted = True
        weight = self.count.to(torch.promote_types(loss.dtype, torch.float32)) / self.reference
        return loss * weight.to(loss.device)

    def finish(self, trainer: Trainer, divided_by: int, taken: int) -> float:
        """What the window's gradient has to be multiplied by; 0 if nothing counted in it. A collective operation.

        Args:
            trainer: The Trainer.
            divided_by: L.
            taken: How many micro-batches it really had.
        """
        total, ranks = float(sum_over_ranks(trainer, self.counted)), trainer.world_size
        scale = self.reference * ranks * divided_by / total if total else 0.0
        self.reference = total / (ranks * taken)
        return scale

    def state_dict(self) -> dict[str, Any]:
        """R, and this rank's part of N."""
        return {"reference": self.reference, "counted": self.counted.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.reference, self.counted = state["reference"], state["counted"]
