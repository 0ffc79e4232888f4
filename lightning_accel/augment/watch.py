"""TargetTransform: a batch transform that looks at what the training step made of the target it changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_accel.augment.target import MixedTarget, Usage
from lightning_accel.hooks import BatchTransform

__all__ = ["TargetTransform"]


class TargetTransform(BatchTransform):
    """A batch transform that warns once a fit where the training step's loss did not see what became of the target."""

    _usage: Usage | None = None
    _warned = False

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the batch transfer, and be ready to warn again."""
        super().install(trainer, pl_module)
        self._usage, self._warned = None, False

    def watch(self, target: Any) -> None:
        """Look at the end of the batch at what the training step did with ``target``."""
        self._usage = target.usage if isinstance(target, MixedTarget) else None

    def complaint(self, usage: Usage) -> str:
        """What the training step missed, in a sentence with the way out; empty if nothing."""
        if not usage.mixed_by:
            saw = f" (`{usage.bypassed_by}` took the hard target as it is)" if usage.bypassed_by else ""
            return (
                f"no loss of `training_step` saw how the target was changed{saw}, so it was that of the hard target. "
                "Use a loss function of `torch.nn.functional` or its module (in a compiled step, one made in "
                "`__init__`), or get the soft vector by `F.one_hot(y, num_classes)`."
            )
        if usage.bypassed_by:
            return (
                f"`{usage.mixed_by}` saw how the target was changed, but `{usage.bypassed_by}` combined the hard one "
                "with values that require grad. If that is part of the loss, use `F.one_hot(y, num_classes)` there; if "
                "it is a metric, detach the values."
            )
        return ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warn if the loss did not see what it should have."""
        usage, self._usage = self._usage, None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        skipped = pl_module.automatic_optimization and loss is None
        if usage is None or self._warned or skipped:
            return
        if message := self.complaint(usage):
            self._warned = True
            self.warn_no_effect(message)
