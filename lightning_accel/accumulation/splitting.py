"""Splitting a batch of any structure into micro-batches, and putting together what a step returned for each of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_accel.hooks.keys import find_item
from lightning_accel.hooks.tensors import weighted_mean

__all__ = ["combine_outputs", "micro_sizes", "samples_of", "split_batch"]

_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
_WAY_OUT = "name what all samples share in `shared_keys`, and lists with an entry for each sample in `list_keys`"


def micro_sizes(samples: int, parts: int) -> list[int]:
    """The sizes of so many micro-batches: they differ by one sample at most.

    Example:
        >>> micro_sizes(10, 4)
        [3, 3, 2, 2]
    """
    least, more = divmod(samples, parts)
    return [least + (number < more) for number in range(parts)]


def samples_of(batch: Any, shared_keys: Collection[str] = (), list_keys: Collection[str] = ()) -> int:
    """The number of samples in a batch: the first dimension that all of its tensors have in common.

    Args:
        batch: Tensors in lists, tuples, mappings and dataclasses, inside one another.
        shared_keys: What is no sample's own, by its path (``"inputs.positions"``): it is passed over.
        list_keys: Lists with an entry for each sample, by their paths; ``""`` is the batch itself.

    Raises:
        TypeError: If the batch holds something that can't be split.
        ValueError: If its tensors differ in their first dimension, or there is none.

    Example:
        >>> samples_of({"x": torch.zeros(4, 3), "names": ["a", "b", "c", "d"], "scale": 0.5})
        4
    """
    if not shared_keys and not list_keys and (common := _common_length(batch)) is not None:
        return common
    for argument, keys in (("shared_keys", shared_keys), ("list_keys", list_keys)):
        for key in keys:
            if key:
                find_item(batch, key, argument)
    lengths = _lengths(batch, "", shared_keys, list_keys)
    path, samples = next(lengths, ("", None))
    if samples is None:
        raise ValueError(f"Expected the batch to have tensors to split, but this {type(batch).__name__} has none.")
    for other, length in lengths:
        if length != samples:
            raise ValueError(
                f"Expected everything in the batch to have an entry for each sample, but {_named(path)} has {samples} "
                f"and {_named(other)} has {length}: {_WAY_OUT}."
            )
    return samples


def split_batch(
    batch: Any, sizes: Sequence[int], shared_keys: Collection[str] = (), list_keys: Collection[str] = ()
) -> list[Any]:
    """Split a batch into micro-batches of the same structure.

    Tensors and NumPy arrays are split along their first dimension, as views, and so is a list of strings or numbers as
    long as there are samples. Every micro-batch gets what has no dimensions, what is in ``shared_keys``, and anything
    else that is no container.

    Args:
        batch: As for :func:`samples_of`.
        sizes: How many samples each micro-batch gets; their sum is :func:`samples_of`.
        shared_keys: What every micro-batch gets as it is.
        list_keys: Lists with an entry for each sample.

    Raises:
        TypeError: If the batch holds something that can't be split.

    Example:
        >>> split_batch({"x": torch.arange(3), "names": ["a", "b", "c"], "scale": 0.5}, [2, 1])[1]
        {'x': tensor([2]), 'names': ['c'], 'scale': 0.5}
    """
    ends = list(accumulate(sizes))
    return _split(
        batch, "", [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)], shared_keys, list_keys
    )


def _common_length(batch: Any) -> int | None:
    """The length of the tensors of a flat batch, as most are, without a look at more than it takes; None of others."""
    items = batch.values() if type(batch) is dict else batch if type(batch) in (list, tuple) else ()
    common = None
    for item in items:
        if type(item) is not Tensor or not item.ndim or item.is_nested:
            return None
        length = item.shape[0]
        if common is not None and length != common:
            return None
        common = length
    return common


def _children(item: Any) -> list[tuple[Any, Any]] | None:
    """The keys and items of a container; None for anything else."""
    if isinstance(item, Mapping):
        return list(item.items())
    if isinstance(item, (list, tuple)):
        return list(zip(getattr(item, "_fields", range(len(item))), item, strict=True))
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return [(field.name, getattr(item, field.name)) for field in dataclasses.fields(item)]
    return None


def _is_array(item: Any) -> bool:
    return isinstance(item, Tensor) or type(item).__module__ == "numpy"


def _is_plain_list(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and all(isinstance(entry, _PLAIN) for entry in item)


def _named(path: str) -> str:
    return f"`{path}`" if path else "the batch"


def _lengths(
    item: Any, path: str, shared_keys: Collection[str], list_keys: Collection[str]
) -> Iterator[tuple[str, int]]:
    """The path and the length of all that has an entry for each sample, but for plain lists, which may not have."""
    if path and path in shared_keys:
        return
    if path in list_keys:
        if not isinstance(item, (list, tuple)):
            raise TypeError(f"Expected `list_keys` to name lists, but {_named(path)} is a {type(item).__name__}.")
        yield path, len(item)
    elif _is_array(item):
        if getattr(item, "is_nested", False):
            _refuse(item, path)
        if item.ndim:
            yield path, len(item)
    elif isinstance(item, PackedSequence):
        _refuse(item, path)
    elif (children := _children(item)) is not None:
        for key, child in children:
            yield from _lengths(child, f"{path}.{key}" if path else str(key), shared_keys, list_keys)
    elif not isinstance(item, _PLAIN):
        _refuse(item, path)


def _refuse(item: Any, path: str) -> None:
    kind = "nested tensor" if isinstance(item, Tensor) else type(item).__name__
    raise TypeError(
        "Expected the batch to be made of tensors, lists, tuples, mappings and dataclasses, which can be split, but "
        f"{_named(path)} is a {kind}: make tensors of it in `collate_fn`, or name it in `shared_keys` if all samples "
        "share it."
    )


def _split(
    item: Any, path: str, slices: list[slice], shared_keys: Collection[str], list_keys: Collection[str]
) -> list[Any]:
    if path and path in shared_keys:
        return [item] * len(slices)
    if path in list_keys or (_is_plain_list(item) and len(item) == slices[-1].stop):
        return [item[part] for part in slices]
    if _is_array(item) and item.ndim:
        if isinstance(item, Tensor) and item.is_sparse:
            rows = [torch.arange(part.start, part.stop, device=item.device) for part in slices]
            return [item.index_select(0, row) for row in rows]
        return [item[part] for part in slices]
    children = _children(item)
    if not children or _is_plain_list(item):
        return [item] * len(slices)
    split = {
        key: _split(child, f"{path}.{key}" if path else str(key), slices, shared_keys, list_keys)
        for key, child in children
    }
    return [_rebuild(item, {key: parts[number] for key, parts in split.items()}) for number in range(len(slices))]


def _rebuild(item: Any, children: dict[Any, Any]) -> Any:
    """A container like ``item`` with these in it."""
    if isinstance(item, (list, tuple)):
        make: Any = getattr(item, "_make", type(item))
        return make(children.values())
    new = copy.copy(item)
    for key, child in children.items():
        if isinstance(item, Mapping):
            new[key] = child
        else:
            object.__setattr__(new, key, child)  # also of a frozen dataclass
    return new


def combine_outputs(outputs: Sequence[Any], samples: Sequence[int], weights: Sequence[float]) -> Any:
    """One value of those that a step returned for each micro-batch.

    Tensors with an entry for each sample are put one after another. Of floating-point numbers the mean is taken. In
    mappings each item is combined. Anything else becomes a list.

    Args:
        outputs: What the step returned.
        samples: The sizes of the micro-batches.
        weights: Their weights.

    Example:
        >>> outputs = [{"scores": torch.ones(2), "norm": 1.0}, {"scores": torch.zeros(1), "norm": 4.0}]
        >>> combine_outputs(outputs, samples=[2, 1], weights=[2, 1])
        {'scores': tensor([1., 1., 0.]), 'norm': 2.0}
    """
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if all(isinstance(value, Tensor) for value in outputs):
        shapes = {value.shape[1:] for value in outputs}
        if len(shapes) == 1 and all(
            value.ndim and len(value) == size for value, size in zip(outputs, samples, strict=True)
        ):
            return torch.cat(list(outputs))
        if all(value.ndim == 0 and value.is_floating_point() for value in outputs):
            return weighted_mean(outputs, weights)
    if all(isinstance(value, float) for value in outputs):
        return sum(value * weight for value, weight in zip(outputs, weights, strict=True)) / sum(weights)
    if isinstance(first, Mapping) and all(
        isinstance(other, Mapping) and other.keys() == first.keys() for other in outputs
    ):
        return {key: combine_outputs([value[key] for value in outputs], samples, weights) for key in first}
    return list(outputs)
