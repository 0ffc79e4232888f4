"""CutMix: paste a rectangle of another image into each, and mix the losses by its area.

Paper: `CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features
<https://arxiv.org/abs/1905.04899>`_ (Yun et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.augment.target import mix_targets
from lightning_accel.augment.transform import (
    PairMix,
    check_images,
    check_pair,
    draw_beta,
    draw_permutation,
    is_spatial,
    map_target,
    select_samples,
    uniform,
)
from lightning_accel.errors import check_number

__all__ = ["CutMix", "cutmix_batch", "draw_boxes"]


def draw_boxes(
    lam: Tensor, height: int, width: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rectangles of the area ``1 - lam``, at uniform places, cut off at the image's border.

    Args:
        lam: The share of the image that is kept, floats of shape (N,).
        height: Height of the image in pixels.
        width: Its width.
        generator: Where to draw from; the global one if ``None``.

    Returns:
        Tops, bottoms, lefts and rights (bottom and right excluded), integers of shape (N,).
    """
    centres = uniform(2 * len(lam), generator).to(lam.device).view(2, -1)
    ratio = (1 - lam).sqrt()
    edges = []
    for centre, side in zip(centres, (height, width), strict=True):
        middle, cut = (centre * side).long(), (ratio * side).long()
        edges += [(middle - cut // 2).clamp(0, side), (middle - cut // 2 + cut).clamp(0, side)]
    return edges[0], edges[1], edges[2], edges[3]


def cutmix_batch(
    x: Tensor,
    y: Tensor,
    alpha: float = 1.0,
    *,
    per_sample: bool = False,
    boxes: Sequence[int] | Tensor | None = None,
    indices: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of another sample into each.

    Args:
        x: Images of shape (B, C, H, W), any dtype.
        y: Targets: labels of shape (B, ...) are mixed by area, as ``mix_targets`` does; a target with a value for each
            pixel, (B, H, W) or (B, C, H, W), gets the same rectangle pasted and stays a plain tensor.
        alpha: The kept share is drawn from Beta(alpha, alpha); 1 is uniform.
        per_sample: Draw one rectangle a sample instead of one for the batch.
        boxes: ``[top, bottom, left, right]`` (bottom and right excluded) for the batch, or integers of shape (4, B)
            for one a sample, instead of drawing them.
        indices: The other sample of each, integers of shape (B,), instead of drawing a permutation.
        generator: Where to draw from; the global one if ``None``.

    Returns:
        The mixed input and target. The share of a sample's own label is the part of its pixels that was kept.
    """
    check_images(x, "CutMix")
    check_pair(x, y)
    height, width = x.shape[-2:]
    if boxes is None:
        lam = draw_beta(
            check_number("alpha", alpha, 0, float("inf"), open_low=True), len(x) if per_sample else 1, generator
        )
        boxes = torch.stack(draw_boxes(lam, height, width, generator))
        boxes = boxes if per_sample else boxes[:, 0]
    boxes = torch.as_tensor(boxes)
    indices = (draw_permutation(len(x), generator) if indices is None else indices).to(x.device)
    top, bottom, left, right = boxes
    lam = (1 - ((bottom - top) * (right - left)).double() / (height * width)).float()
    if boxes.ndim == 1:
        rows, columns = slice(int(top), int(bottom)), slice(int(left), int(right))

        def paste(part: Tensor) -> Tensor:
            part = part.clone()
            part[..., rows, columns] = select_samples(part[..., rows, columns], indices)
            return part
    else:
        row = torch.arange(height, device=x.device).view(-1, 1)
        column = torch.arange(width, device=x.device)
        top, bottom, left, right = boxes.to(x.device)[..., None, None]
        inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)  # (B, H, W)

        def paste(part: Tensor) -> Tensor:
            mask = inside.view(-1, *[1] * (part.ndim - 3), height, width)
            return torch.where(mask, select_samples(part, indices), part)

    return paste(x), map_target(y, paste) if is_spatial(x, y) else mix_targets(y, indices, lam)


class CutMix(PairMix):
    """Paste a rectangle of another image of the batch into each, and mix the losses by its area.

    Args:
        alpha: The kept share is drawn from Beta(alpha, alpha): 1 is uniform. 0 returns the batch itself.
        per_sample: Whether each sample has its own rectangle, instead of one for the batch.
        p: Probability that a batch (with ``per_sample``, a sample) is mixed at all, in [0, 1].

    Example:
        >>> x, y = CutMix(alpha=1.0)(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
        >>> loss = torch.nn.functional.cross_entropy(torch.rand(4, 10), y)  # of the mix
    """

    def __init__(self, alpha: float = 1.0, per_sample: bool = False, p: float = 1.0) -> None:
        super().__init__(alpha, per_sample, p)

    def forward(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Mix the batch with itself; only images have rectangles."""
        if not self.is_neutral:
            check_images(x, "CutMix")
        return super().forward(x, y, generator)

    def mix(self, x: Tensor, y: Tensor, lam: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Cut and paste by the shares drawn."""
        boxes = torch.stack(draw_boxes(lam, x.shape[-2], x.shape[-1], generator))
        return cutmix_batch(x, y, boxes=boxes if self.per_sample else boxes[:, 0], generator=generator)
