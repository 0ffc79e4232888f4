"""Random crop: pad each image of a batch and cut a window out of it, at its own place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_accel.augment.transform import Transform, check_images, is_spatial, map_target
from lightning_accel.errors import check_int

__all__ = ["RandomCrop", "crop_batch"]

_SMALL = 64 * 64
"""Windows of fewer pixels are gathered in one operation, larger ones copied one by one: the faster way on a CPU."""


def crop_batch(
    x: Tensor, tops: Tensor, lefts: Tensor, size: tuple[int, int], padding: int = 0, fill: float = 0
) -> Tensor:
    """Cut one window out of each sample.

    Args:
        x: Tensor of shape (B, H, W) or (B, C, H, W), any dtype.
        tops: First row of each window, in the padded image, integers of shape (B,) on the CPU or the device of ``x``.
        lefts: First column of each window, likewise.
        size: Height and width of the windows.
        padding: Pixels added on all four sides.
        fill: Their value.

    Returns:
        A new tensor of shape (B, ..., *size) in the memory format of ``x``.
    """
    height, width = size
    if x.device.type == "cpu" and height * width >= _SMALL:
        return _copy_windows(x, tops, lefts, size, padding, fill)
    padded = F.pad(x, (padding, padding, padding, padding), value=fill) if padding else x
    windows = padded.unfold(-2, height, 1).unfold(-2, width, 1)  # (B, ..., rows, columns, height, width), a view
    samples = torch.arange(len(x), device=x.device)
    cropped = windows[samples, ..., tops.to(x.device), lefts.to(x.device), :, :]  # (B, ..., height, width)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return cropped.contiguous(memory_format=torch.channels_last)
    return cropped.contiguous()


def _copy_windows(x: Tensor, tops: Tensor, lefts: Tensor, size: tuple[int, int], padding: int, fill: float) -> Tensor:
    """Copy the part of each window that lies on the image: no padded images in between."""
    height, width = size
    out = torch.full_like(x[..., :1, :1], fill).expand(*x.shape[:-2], height, width)
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    out = out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for target, source, top, left in zip(out.unbind(), x.unbind(), tops.tolist(), lefts.tolist(), strict=True):
        top, left = top - padding, left - padding  # of the window, in the image without padding
        rows = slice(max(top, 0), min(top + height, x.shape[-2]))
        columns = slice(max(left, 0), min(left + width, x.shape[-1]))
        if rows.start < rows.stop and columns.start < columns.stop:
            target[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = source[
                ..., rows, columns
            ]
    return out


class RandomCrop(Transform):
    """Cut a window of a fixed size out of each image, each at its own random place.

    A target with a value for each pixel, (B, H, W) or (B, C, H, W), is cut with its image; any other is left alone.

    Args:
        size: Side of the square window in pixels, or ``[height, width]``.
        padding: Pixels added on all four sides beforehand.
        fill: Value of the added pixels of the input.
        target_fill: Value of the added pixels of a spatial target with integer values; the default is what
            ``F.cross_entropy`` ignores. A floating target gets ``fill``.

    Raises:
        ValueError: If the padded images are smaller than the window.

    Example:
        >>> RandomCrop(32, padding=4)(torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 3, 32, 32])
    """

    def __init__(self, size: int | list[int], padding: int = 0, fill: float = 0.0, target_fill: int = -100) -> None:
        super().__init__()
        sides = [size, size] if isinstance(size, int) else list(size)
        if len(sides) != 2:
            raise ValueError(f"Expected `size` to be an int or [height, width], but got {size!r}.")
        self.size = (check_int("size", sides[0], minimum=1), check_int("size", sides[1], minimum=1))
        self.padding = check_int("padding", padding, minimum=0)
        self.fill = fill
        self.target_fill = check_int("target_fill", target_fill)

    def forward(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Cut windows out of images, and out of the masks that belong to them."""
        check_images(x, "RandomCrop")
        room = [side + 2 * self.padding - window for side, window in zip(x.shape[-2:], self.size, strict=True)]
        if min(room) < 0:
            raise ValueError(
                f"Expected images of at least {self.size[0]} x {self.size[1]} pixels with their padding, but got "
                f"{x.shape[-2]} x {x.shape[-1]} and `padding` {self.padding}."
            )
        if room == [0, 0] and not self.padding:
            return x, y
        device = generator.device if generator is not None else "cpu"
        tops, lefts = (torch.randint(r + 1, (len(x),), generator=generator, device=device) for r in room)
        if y is not None and is_spatial(x, y):
            fill = self.fill if y.is_floating_point() else self.target_fill
            self._check_fits(y, fill)
            y = map_target(y, lambda part: crop_batch(part, tops, lefts, self.size, self.padding, fill))
        return crop_batch(x, tops, lefts, self.size, self.padding, self.fill), y

    def _check_fits(self, y: Tensor, fill: float) -> None:
        if self.padding and not y.is_floating_point() and y.dtype != torch.bool:
            limits = torch.iinfo(y.dtype)
            if not limits.min <= fill <= limits.max:
                raise ValueError(f"Expected `target_fill` to fit into the target's {y.dtype}, but got {fill}.")

    def extra_repr(self) -> str:
        """The arguments."""
        return f"size={list(self.size)}, padding={self.padding}, fill={self.fill}, target_fill={self.target_fill}"
