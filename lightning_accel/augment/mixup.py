"""MixUp: train on weighted averages of pairs of samples, and of their losses.

Paper: `mixup: Beyond Empirical Risk Minimization <https://arxiv.org/abs/1710.09412>`_ (Zhang et al. 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_accel.augment.target import mix_targets
from lightning_accel.augment.transform import (
    PairMix,
    check_pair,
    draw_beta,
    draw_permutation,
    select_samples,
)
from lightning_accel.errors import check_number

__all__ = ["MixUp", "mixup_batch"]


def mixup_batch(
    x: Tensor,
    y: Tensor,
    alpha: float = 0.2,
    *,
    per_sample: bool = False,
    lam: float | Tensor | None = None,
    indices: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Average each sample with another: ``lam * x + (1 - lam) * x[indices]``.

    Args:
        x: Floating input of shape (B, ...).
        y: Targets of shape (B, ...): integer labels become a ``MixedTarget``, floating values are averaged like ``x``.
        alpha: ``lam`` is drawn from Beta(alpha, alpha): the larger, the nearer to 1/2.
        per_sample: Draw one ``lam`` a sample instead of one for the batch.
        lam: The share of the sample itself, 0-d or of shape (B,), instead of drawing it.
        indices: The other sample of each, integers of shape (B,), instead of drawing a permutation.
        generator: Where to draw from; the global one if ``None``.

    Returns:
        The mixed input and target.

    Raises:
        TypeError: If ``x`` is not floating: averages of bytes would be rounded, those of token ids mean nothing.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"Expected `x` to be floating for MixUp, but got {x.dtype}: convert it first, `x.float() / 255`."
        )
    check_pair(x, y)
    if lam is None:
        lam = draw_beta(
            check_number("alpha", alpha, 0, float("inf"), open_low=True), len(x) if per_sample else 1, generator
        )
        lam = lam if per_sample else lam[0]
    lam = torch.as_tensor(lam, dtype=torch.float32).to(x.device)
    indices = (draw_permutation(len(x), generator) if indices is None else indices).to(x.device)
    share = lam.view(-1, *[1] * (x.ndim - 1)) if lam.ndim else lam
    return select_samples(x, indices).lerp_(x, share.to(x.dtype)), mix_targets(y, indices, lam)


class MixUp(PairMix):
    """Average each sample of the batch with another one, and their losses likewise.

    Args:
        alpha: Strength: the share is drawn from Beta(alpha, alpha). 0 returns the batch itself; 0.1 to 0.4 are usual.
        per_sample: Whether each sample has its own share, instead of one for the batch.
        p: Probability that a batch (with ``per_sample``, a sample) is mixed at all, in [0, 1].

    Example:
        >>> x, y = MixUp(alpha=0.2)(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
        >>> loss = torch.nn.functional.cross_entropy(torch.rand(4, 10), y)  # of the mix
    """

    def __init__(self, alpha: float = 0.2, per_sample: bool = False, p: float = 1.0) -> None:
        super().__init__(alpha, per_sample, p)

    def mix(self, x: Tensor, y: Tensor, lam: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Average by the shares drawn."""
        return mixup_batch(x, y, lam=lam if self.per_sample else lam[0], generator=generator)
