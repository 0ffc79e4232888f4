"""Transform: the base of the augmentations, stateless modules that draw from the generator they are given."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from lightning_accel.augment.target import MixedTarget
from lightning_accel.errors import check_fraction, check_number

__all__ = [
    "PairMix",
    "Transform",
    "check_images",
    "check_pair",
    "draw_beta",
    "draw_permutation",
    "is_spatial",
    "select_samples",
]


class Transform(nn.Module):
    """An augmentation of a whole batch: ``x = t(x)``, or ``x, y = t(x, y)``.

    A subclass implements :meth:`forward`. It holds no state, never changes its arguments in place, and draws from
    ``generator`` alone, so that the same generator gives the same batch.
    """

    needs_target: ClassVar[bool] = False
    """Whether it changes what the target means, so that ``x = t(x)`` is an error."""

    @property
    def is_neutral(self) -> bool:
        """Whether its arguments make it return the very objects that it is given, without drawing."""
        return False

    @overload
    def __call__(self, x: Tensor, y: None = None, *, generator: torch.Generator | None = None) -> Tensor: ...

    @overload
    def __call__(self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]: ...

    def __call__(self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None) -> Any:
        """Return the changed batch, or the very objects given where there is nothing to do."""
        if y is None and self.needs_target:
            raise ValueError(f"Expected `y` to be the target, which {type(self).__name__} mixes, but got None.")
        x, target = super().__call__(x, y, generator)
        return x if y is None else (x, target)

    def forward(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Return the changed input and target; to be overridden."""
        raise NotImplementedError


class PairMix(Transform):
    """A transform that mixes pairs of samples, and their targets, by a share drawn from Beta(alpha, alpha).

    Args:
        alpha: The share is drawn from Beta(alpha, alpha). 0 returns the batch itself.
        per_sample: Whether each sample has its own share, instead of one for the batch.
        p: Probability that a batch (with ``per_sample``, a sample) is mixed at all, in [0, 1].
    """

    needs_target = True

    def __init__(self, alpha: float, per_sample: bool, p: float) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, 0, float("inf"), open_high=True)
        self.per_sample = per_sample
        self.p = check_fraction("p", p)

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is ever mixed."""
        return self.alpha == 0 or self.p == 0

    def mix(self, x: Tensor, y: Tensor, lam: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Mix the batch with itself; ``lam`` has the share of the sample itself, (B,) or (1,). To be overridden."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Draw the shares and mix the batch with itself."""
        assert y is not None  # `needs_target`
        if self.is_neutral:
            return x, y
        count = len(x) if self.per_sample else 1
        lam = draw_beta(self.alpha, count, generator)
        if self.p < 1:
            lam = lam.where(uniform(count, generator) < self.p, 1.0)
            if not self.per_sample and lam == 1:
                return x, y
        return self.mix(x, y, lam, generator)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"alpha={self.alpha}, per_sample={self.per_sample}, p={self.p}"


def check_images(x: Tensor, method: Literal["CutMix", "RandomCrop", "RandomHorizontalFlip"]) -> None:
    """Raise unless ``x`` is a batch of images of shape (B, C, H, W)."""
    if x.ndim != 4:
        raise ValueError(
            f"Expected `x` to be a batch of images (B, C, H, W) for {method}, but got shape {tuple(x.shape)}."
        )


def check_pair(x: Tensor, y: Tensor) -> None:
    """Raise unless ``y`` has one target for each sample of ``x``."""
    if not isinstance(y, Tensor):
        raise TypeError(f"Expected `y` to be a tensor with one target a sample, but got {type(y).__name__}.")
    if y.ndim == 0 or len(y) != len(x):
        raise ValueError(
            f"Expected `y` to have one target for each of {len(x)} samples, but got shape {tuple(y.shape)}."
        )


def is_spatial(x: Tensor, y: Tensor) -> bool:
    """Whether ``y`` has a value for each pixel of ``x``, as a mask (B, H, W) or a picture (B, C, H, W) has."""
    return y.ndim >= 3 and x.ndim == 4 and y.shape[0] == x.shape[0] and y.shape[-2:] == x.shape[-2:]


def map_target(y: Tensor, function: Any) -> Tensor:
    """Move the pixels of a spatial target, and those of every label of a mixed one."""
    moved: Tensor = y.map(function, spread=True) if isinstance(y, MixedTarget) else function(y)
    return moved


def select_samples(x: Tensor, indices: Tensor) -> Tensor:
    """``x[indices]`` in the memory format of ``x``, as fast as can be."""
    # `index_select` is twice as fast as indexing, but always returns a contiguous tensor
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x[indices] if channels_last else x.index_select(0, indices)


def uniform(count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` numbers in [0, 1), on the generator's device (the CPU without one)."""
    return torch.rand(count, generator=generator, device=generator.device if generator is not None else "cpu")


def draw_permutation(count: int, generator: torch.Generator | None) -> Tensor:
    """A random order of ``count`` samples."""
    # not `randperm`: indexing with it inside `torch.compile` crashes inductor in torch 2.13
    return uniform(count, generator).argsort()


def draw_beta(alpha: float, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` draws of Beta(alpha, alpha), float32."""
    # `torch.distributions.Beta` has no generator; this is the function under it
    device = generator.device if generator is not None else "cpu"
    concentration = torch.full((count, 2), alpha, dtype=torch.float64, device=device)
    return torch._sample_dirichlet(concentration, generator)[:, 0].float()
