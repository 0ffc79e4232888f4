"""LabelSmoothing: the loss of targets that are a little unsure, without editing the module that takes the loss.

Paper: `Rethinking the Inception Architecture for Computer Vision <https://arxiv.org/abs/1512.00567>`_ (Szegedy et al.
2016), section 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_accel.augment.target import Usage, smooth_targets
from lightning_accel.augment.watch import TargetTransform
from lightning_accel.errors import check_fraction
from lightning_accel.hooks import Contract
from lightning_accel.hooks.keys import find_item, replace_item

__all__ = ["LabelSmoothing"]


class LabelSmoothing(TargetTransform):
    """Move the share ``smoothing`` of each training target to all classes equally.

    The loss of the unedited training step is that of ``F.cross_entropy(..., label_smoothing=smoothing)``; validation is
    not smoothed. Smoothing that the module does itself comes on top: together they are
    ``1 - (1 - a) * (1 - b)``, which is what smoothing twice amounts to.

    Args:
        smoothing: The share, in [0, 1]. 0 leaves the run as it is.
        target_key: Where the target is in the batch: an index, a key, an attribute, or a path such as
            ``"targets.label"``.

    Raises:
        ValueError: If ``smoothing`` is not in [0, 1]; during training, if the batch lacks the target.
    """

    contract = Contract(
        purpose="Smooth the training targets, without editing the loss.",
        touches=frozenset({"target"}),
        acts="every training batch",
        expects="less overconfident predictions",
        docs="methods/label_smoothing",
        once=True,
    )

    def __init__(self, smoothing: float = 0.1, target_key: int | str = 1) -> None:
        self.smoothing = check_fraction("smoothing", smoothing)
        super().__init__(smoothing=smoothing, target_key=target_key)
        self.target_key = target_key

    @property
    def is_neutral(self) -> bool:
        """Whether ``smoothing`` is 0."""
        return self.smoothing == 0

    def transform_batch(self, batch: Any, generator: torch.Generator) -> Any:
        """Smooth the target."""
        if self.is_neutral:
            return batch
        if isinstance(batch, Tensor):
            raise ValueError("Expected the batch to have a target for LabelSmoothing, but it is a single tensor.")
        target = find_item(batch, self.target_key, "target_key")
        if not isinstance(target, Tensor):
            raise TypeError(f"Expected `target_key` to name a tensor of the batch, but got {type(target).__name__}.")
        smoothed = smooth_targets(target, self.smoothing)
        self.watch(smoothed)
        return replace_item(batch, self.target_key, smoothed)

    def complaint(self, usage: Usage) -> str:
        """Also where the loss is one for which smoothing means nothing."""
        if usage.unsmoothed_by:
            return f"`{usage.unsmoothed_by}` is no loss of classes, so there is nothing to smooth: remove it."
        return super().complaint(usage)
