"""ZeroRedundancyStrategy: ZeRO stage 1 with torch alone, as DDP in which each rank steps its part of the optimizer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from lightning_accel.hooks.optimizers import replace_optimizers
from lightning_accel.strategies.ddp import RestartableDDPStrategy
from lightning_accel.strategies.sharding import check_same_modules

__all__ = ["ZeroRedundancyStrategy"]


def _describe(optimizer: Optimizer) -> Any:
    shapes = [[tuple(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]
    return [type(optimizer).__name__, shapes]


class ZeroRedundancyStrategy(RestartableDDPStrategy):
    """DDP whose optimizer state is split over the ranks (ZeRO stage 1), with torch alone.

    Losses, weights and steps are those of DDP. Checkpoints are plain files with the whole state, which any number of
    ranks, and DDP or a single device, goes on from, and the reverse. A parameter belongs to one rank as a whole, so
    the split is as even as the largest one allows, and optimizers that work on whole matrices are split as well.

    An optimizer that looks at all parameters at once is not right on a part of them. LBFGS, a closure that is called
    twice in a step, and one that keeps such a number in its groups (as Prodigy) are refused; others, as one that
    scales by a norm over all gradients, can't be told.

    Args:
        **kwargs: Those of :class:`RestartableDDPStrategy`: ``timeout``, ``start_timeout``, and through it those of
            torch's DistributedDataParallel.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._split: list[Any] = []

    def configure_ddp(self) -> None:
        """Wrap the module, after a look whether all ranks have the same."""
        module = self.lightning_module
        assert module is not None
        check_same_modules(module)
        super().configure_ddp()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Split the optimizers that ``configure_optimizers`` returned, and point the schedulers at them."""
        # Torch's ZeroRedundancyOptimizer takes 0.3 s to import
        from lightning_accel.strategies.sharded_optimizer import shard_optimizer

        super().setup_optimizers(trainer)
        old = [made.optimizer if isinstance(made, LightningOptimizer) else made for made in self.optimizers]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, list(map(_describe, old)))
        if any(other != everyone[0] for other in everyone):
            raise MisconfigurationException(
                "`configure_optimizers` returned optimizers of other classes, groups or shapes on some ranks. Make the "
                "same on every rank."
            )
        new = [shard_optimizer(optimizer) for optimizer in old]
        replace_optimizers(
            [config.scheduler for config in self.lr_scheduler_configs],
            {id(before): after for before, after in zip(old, new, strict=True)},
        )
        self.optimizers = new
        self._split = [after for before, after in zip(old, new, strict=True) if after is not before]

    def teardown(self) -> None:
        """Give the optimizers that ``configure_optimizers`` made their methods back."""
        for optimizer in self._split:
            optimizer.release()
        super().teardown()
