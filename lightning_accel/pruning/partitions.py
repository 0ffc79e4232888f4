"""Masks for what a sharding strategy keeps of the weights: flat fp32 partitions, and the optimizer's state of them.

At stages 1 and 2 of ZeRO every rank has the whole weights, and steps a part of a flat fp32 copy. A mask must reach that
copy, or the next step would bring the pruned weights back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_accel.pruning.masks import SQUARES

__all__ = ["PartitionsOf", "mask_partitions_"]

PartitionsOf = Callable[[Sequence[Tensor]], Sequence[tuple[int, Tensor, dict[str, Tensor]] | None]]
"""From weights to this rank's part of each, or None: where it starts, the fp32 copy and the state, flat views."""


def mask_partitions_(
    partitions_of: PartitionsOf, weights: Sequence[Tensor], masks: Sequence[Tensor], *, state: bool
) -> None:
    """Zero what is pruned in this rank's partitions of the weights, in place.

    Args:
        partitions_of: The strategy's.
        weights: The weights.
        masks: One a weight: 1 kept, 0 pruned.
        state: Whether to zero the momentum too, as ``mask_optimizer_state_`` does.
    """
    with torch.no_grad():
        for part, mask in zip(partitions_of(weights), masks, strict=True):
            if part is None:
                continue
            start, copy, states = part
            kept = mask.reshape(-1)[start : start + copy.numel()].to(copy)
            copy.mul_(kept)
            for name, value in states.items() if state else ():
                if name not in SQUARES:
                    value.mul_(kept)
