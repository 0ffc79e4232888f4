"""Random horizontal flip: mirror each image of a batch with some probability."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_accel.augment.transform import Transform, check_images, is_spatial, map_target, select_samples, uniform
from lightning_accel.errors import check_fraction

__all__ = ["RandomHorizontalFlip", "flip_batch"]


def flip_batch(x: Tensor, indices: Tensor) -> Tensor:
    """Mirror some samples left to right.

    Args:
        x: Any tensor of shape (B, ..., W), any dtype.
        indices: Which samples to mirror, integers of shape (N,), each at most once.

    Returns:
        A new tensor in the memory format of ``x``.
    """
    flipped = select_samples(x, indices).flip(-1)
    return x.clone().index_copy_(0, indices, flipped)


class RandomHorizontalFlip(Transform):
    """Mirror each image left to right with probability ``p``.

    A target with a value for each pixel, (B, H, W) or (B, C, H, W), is mirrored with its image; any other is left
    alone.

    Args:
        p: Probability for each image, in [0, 1]. 0 returns the batch itself.

    Example:
        >>> x = torch.arange(3.0).expand(1, 1, 1, 3)
        >>> RandomHorizontalFlip(p=1.0)(x)
        tensor([[[[2., 1., 0.]]]])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = check_fraction("p", p)

    @property
    def is_neutral(self) -> bool:
        """Whether no image is ever mirrored."""
        return self.p == 0

    def forward(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Mirror images, and the masks that belong to them."""
        check_images(x, "RandomHorizontalFlip")
        if self.is_neutral:
            return x, y
        # the positions are found where they were drawn, so that a GPU need not wait for their number
        indices = (uniform(len(x), generator) < self.p).nonzero().flatten().to(x.device)
        if y is not None and is_spatial(x, y):
            y = map_target(y, lambda part: flip_batch(part, indices))
        return flip_batch(x, indices), y

    def extra_repr(self) -> str:
        """The arguments."""
        return f"p={self.p}"
