"""Magnitude masks: which weights to prune, and keeping them pruned.

A mask has the shape, dtype and memory format of its weight and is 1 where the weight is kept and 0 where it is pruned:
one ``torch._foreach_mul_`` applies it, which costs a fifth of a boolean ``masked_fill_`` on the CPU.

The weights with the smallest magnitudes are pruned, exactly as many as asked for. Finding them needs no sort and no
copy of all weights: a sample gives a narrow bracket around the threshold, one pass counts what is below and collects
what is inside (about 2%), and a selection among those gives the exact threshold. Magnitudes are compared by their
bits, which order like the numbers and put NaN last. Equal magnitudes are pruned in the order of the weights and of
their memory, so replicas with equal weights get equal masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_accel.errors import check_choice, check_fraction

__all__ = [
    "SQUARES",
    "apply_masks_",
    "compute_masks",
    "count_pruned",
    "mask_optimizer_state_",
    "pack_mask",
    "unpack_mask",
]

_INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Keys of one chunk stay in a CPU's cache; on a GPU fewer launches matter more.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 26
_SAMPLES = 1 << 16
SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
"""The names of torch's optimizers for what they divide by."""
# Their steps leave a weight at zero whose gradient and momentum are zero; what else they keep only divides.
_KEEP_ZERO = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
}


class _Flat(NamedTuple):
    """One weight and its masks, flat in the order of memory."""

    weight: Tensor
    before: Tensor | None
    after: Tensor


def compute_masks(
    weights: Sequence[Tensor], amount: float, scope: str = "global", masks: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Masks that prune the smallest magnitudes until ``amount`` of all elements is pruned.

    What ``masks`` prunes stays pruned and counts towards ``amount``, so calling this again never adds up; where more
    than ``amount`` is pruned already, the masks come back unchanged.

    Args:
        weights: Dense floating-point tensors of any shapes; they are only read.
        amount: The fraction of all elements to prune in all, in [0, 1]; the number is rounded to the nearest.
        scope: ``"global"`` (one threshold for all weights) or ``"layer"`` (``amount`` of each weight).
        masks: The masks so far, one a weight.

    Returns:
        One mask a weight, in its shape and dtype: 1 kept, 0 pruned. The arguments are unchanged.

    Raises:
        TypeError: If a weight is not a dense floating-point tensor.
        ValueError: If ``amount`` or ``scope`` is wrong, or ``masks`` don't fit ``weights``.

    Example:
        >>> compute_masks([torch.tensor([3.0, -1.0]), torch.tensor([[0.5], [-2.0]])], amount=0.5)
        [tensor([1., 0.]), tensor([[0.],
                [1.]])]
    """
    check_fraction("amount", amount)
    check_choice("scope", scope, ("global", "layer"))
    if masks is not None and [mask.shape for mask in masks] != [weight.shape for weight in weights]:
        raise ValueError(
            f"Expected `masks` to have the shapes of `weights`, but got {[tuple(mask.shape) for mask in masks]}."
        )
    for weight in weights:
        if weight.layout is not torch.strided or not weight.is_floating_point() or weight.element_size() < 2:
            raise TypeError(
                "Expected `weights` to be dense floating-point tensors of 16 bits or more, "
                f"but got one of {weight.dtype}, {weight.layout}."
            )
    with torch.no_grad():
        flats = [
            _flatten(weight.detach(), None if masks is None else masks[index]) for index, weight in enumerate(weights)
        ]
        for group in [flats] if scope == "global" else [[flat] for flat in flats]:
            _prune_smallest(group, round(amount * sum(flat.weight.numel() for flat in group)))
        return [
            flat.after.as_strided(weight.shape, flat_strides)
            for flat, weight, flat_strides in zip(flats, weights, map(_dense_strides, weights), strict=True)
        ]


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set what the masks prune to zero, in place."""
    if tensors:
        with torch.no_grad():
            torch._foreach_mul_(list(tensors), list(masks))


def mask_optimizer_state_(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the optimizer's momentum of pruned elements to zero, in place: it must not act on what is gone.

    Every plain floating-point state tensor in the shape of its weight is masked, except averages and sums of squares:
    they only divide, and the square root of zero takes MKL seven times as long as that of another number, which made
    AdamW's step on the CPU 1.5 times as long. These, and state in another form (quantised, factored), are left to decay
    under masked gradients.
    """
    pairs = [
        (state, mask)
        for weight, mask in zip(weights, masks, strict=True)
        for name, state in optimizer.state.get(weight, {}).items()
        if name not in SQUARES
        and type(state) is Tensor
        and state.shape == weight.shape
        and state.is_floating_point()
        and state.dim()
    ]
    apply_masks_([state for state, _ in pairs], [mask.to(state) for state, mask in pairs])


def keeps_zero(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step leaves weights at zero whose gradients and momentum (see :func:`mask_optimizer_state_`) are zero.

    True for some of torch's own classes as they are; a subclass, or state in another form, may do anything.
    """
    return type(optimizer) in _KEEP_ZERO and all(group.get("eps", 1.0) > 0 for group in optimizer.param_groups)


def count_pruned(mask: Tensor) -> int:
    """The number of elements that a mask prunes."""
    return mask.numel() - int(torch.count_nonzero(mask))


def pack_mask(mask: Tensor) -> Tensor:
    """A mask in one bit an element: uint8 of shape ``(ceil(numel / 8),)``, for a checkpoint."""
    bits = torch.nn.functional.pad((mask.reshape(-1) != 0).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, like: Tensor) -> Tensor:
    """The mask that :func:`pack_mask` packed, in the shape, dtype, device and memory format of ``like``.

    Raises:
        ValueError: If ``packed`` has not the size of such a mask.
    """
    if packed.numel() != math.ceil(like.numel() / 8):
        raise ValueError(f"Expected a packed mask for the shape {tuple(like.shape)}, but got {packed.numel()} bytes.")
    packed = packed.to(like.device)
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=like.device)) & 1
    mask = torch.empty_strided(like.shape, _dense_strides(like), dtype=like.dtype, device=like.device)
    return mask.copy_(bits.reshape(-1)[: like.numel()].view(like.shape))


def _memory_order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=lambda dim: -tensor.stride()[dim])


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``tensor`` if it fills its memory without gaps (dimensions in any order), else contiguous ones."""
    if tensor.permute(_memory_order(tensor)).is_contiguous():
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()


def _flatten(weight: Tensor, mask: Tensor | None) -> _Flat:
    order = _memory_order(weight)
    if not weight.permute(order).is_contiguous():
        order = list(range(weight.dim()))
    after = torch.empty(weight.numel(), dtype=weight.dtype, device=weight.device)
    return _Flat(
        weight.permute(order).reshape(-1), None if mask is None else mask.detach().permute(order).reshape(-1), after
    )


def _keys(weight: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Integers that order like the magnitudes, in ``dtype``: NaN last, what is pruned already first (-1)."""
    as_int = _INT_OF_SIZE[dtype.itemsize]
    keys = weight.to(dtype).view(as_int) & torch.iinfo(as_int).max
    if mask is not None:
        # the bits of 1.0 minus 1 are positive, those of 0.0 minus 1 are all ones: an arithmetic shift spreads the sign
        keys |= (mask.to(dtype).view(as_int) - 1) >> (8 * dtype.itemsize - 1)
    return keys


def _chunks(flats: Sequence[_Flat], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys of every chunk and the slice of the new mask that belongs to it."""
    for weight, before, after in flats:
        size = _CPU_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK
        for start in range(0, weight.numel(), size):
            part = slice(start, start + size)
            yield _keys(weight[part], None if before is None else before[part], dtype), after[part]


def _prune_smallest(flats: Sequence[_Flat], num_pruned: int) -> None:
    """Write masks that prune ``num_pruned`` elements into ``after``."""
    already = sum(count_pruned(flat.before) for flat in flats if flat.before is not None)
    if num_pruned <= already:
        for flat in flats:
            flat.after.copy_(flat.before) if flat.before is not None else flat.after.fill_(1)
        return
    dtype = flats[0].weight.dtype
    for flat in flats:
        dtype = torch.promote_types(dtype, flat.weight.dtype)
    threshold, num_ties, ties_left = _threshold(flats, num_pruned, dtype)
    split_ties = ties_left < num_ties
    for keys, after in _chunks(flats, dtype):
        if split_ties:
            ties = (keys == threshold).nonzero().squeeze(1)
            after.copy_(keys.gt_(threshold))
            after[ties[ties_left:]] = 1
            ties_left = max(ties_left - ties.numel(), 0)
        else:
            after.copy_(keys.gt_(threshold))


def _threshold(flats: Sequence[_Flat], rank: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The key of the ``rank``-th smallest element (from 1), how many have that key, and how many of those to prune.

    The key is at least 0: ``rank`` is above the number of elements pruned already.
    """
    total = sum(flat.weight.numel() for flat in flats)
    stride = max(total // _SAMPLES, 1)
    samples = torch.cat(
        [
            _keys(flat.weight[::stride], None if flat.before is None else flat.before[::stride], dtype).cpu()
            for flat in flats
        ]
    ).sort()[0]
    size = samples.numel()
    # 5 standard deviations of the rank in a random sample; a bracket that misses is moved, so this is only about speed
    position, slack = int((rank - 0.5) / total * size), int(2.5 * math.sqrt(size)) + 1
    top = torch.iinfo(samples.dtype).max
    low = max(int(samples[position - slack]), 0) if position >= slack else 0
    high = max(int(samples[position + slack]), low) if position + slack < size else top
    while True:
        below, inside = 0, []
        for keys, _ in _chunks(flats, dtype):
            inside.append(keys[(keys >= low) & (keys <= high)].cpu())
            below += int(torch.count_nonzero(keys < low))
        candidates = torch.cat(inside)
        if rank <= below:
            low, high = 0, low - 1
        elif rank > below + candidates.numel():
            low, high = high + 1, top
        else:
            key = int(candidates.kthvalue(rank - below)[0])
            num_ties = int(torch.count_nonzero(candidates == key))
            return key, num_ties, rank - below - int(torch.count_nonzero(candidates < key))
