"""BatchAugmentation: augment whole training batches on the device, between the loader and an unedited training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.augment.transform import Transform
from lightning_accel.augment.watch import TargetTransform
from lightning_accel.hooks import Contract
from lightning_accel.hooks.keys import find_item, replace_item

__all__ = ["BatchAugmentation", "augment_batch"]


def augment_batch(
    batch: Any,
    transforms: Sequence[Transform],
    input_key: int | str = 0,
    target_key: int | str | None = 1,
    generator: torch.Generator | None = None,
) -> Any:
    """Apply transforms, in order, to the input and the target of a batch.

    Args:
        batch: A tensor (then it is the input, and there is no target), or a tuple, list, named tuple, mapping or
            dataclass that has them.
        transforms: The transforms.
        input_key: Where the input is: an index, a key, an attribute, or a path of them such as ``"inputs.pixels"``.
        target_key: Where the target is; ``None`` for a batch without one.
        generator: Where all draws come from.

    Returns:
        A new batch of the same kind; the batch itself if no transform changed anything.

    Raises:
        ValueError: If the batch lacks an item, or a transform needs a target and there is none.
    """
    x = batch if isinstance(batch, Tensor) else find_item(batch, input_key, "input_key")
    if not isinstance(x, Tensor):
        raise TypeError(
            f"Expected `input_key` to name a tensor of the batch, but {input_key!r} is a {type(x).__name__}."
        )
    y = _find_target(batch, target_key)
    new_x, new_y = x, y
    for transform in transforms:
        if transform.needs_target and y is None:
            raise ValueError(
                f"Expected the batch to have a target for {type(transform).__name__}, but there is none: name it by "
                "`target_key`, or leave the transform out."
            )
        if transform.needs_target or isinstance(new_y, Tensor):
            new_x, new_y = transform(new_x, new_y, generator=generator)
        else:
            new_x = transform(new_x, generator=generator)
    if isinstance(batch, Tensor):
        return new_x
    if new_x is not x:
        batch = replace_item(batch, input_key, new_x)
    if target_key is not None and new_y is not y:
        batch = replace_item(batch, target_key, new_y)
    return batch


def _find_target(batch: Any, key: int | str | None) -> Any:
    """The target of a batch; ``None`` where it has an input alone."""
    if key is None or isinstance(batch, Tensor) or (isinstance(batch, (tuple, list)) and len(batch) == 1):
        return None
    return find_item(batch, key, "target_key")


class BatchAugmentation(TargetTransform):
    """Augment each training batch on the device, before ``training_step`` sees it.

    Validation, testing and prediction see their batches untouched. Where labels are mixed, the loss of the unedited
    training step is the exact mix of the losses, and its metrics see the label with the largest share.

    Args:
        transforms: The transforms, applied in order.
        input_key: Where the input is in the batch: an index, a key, an attribute, or a path such as
            ``"inputs.pixels"``. A batch that is a tensor is the input itself.
        target_key: Where the target is; ``None`` for batches without one.
        seed: Seed of the draws; ``None`` takes the run's.

    Raises:
        TypeError: If ``transforms`` holds something else.
        ValueError: If ``transforms`` is empty; during training, if the batch lacks an item.
    """

    contract = Contract(
        purpose="Augment whole batches on the device: flip, crop, MixUp, CutMix.",
        touches=frozenset({"input", "target"}),
        acts="every training batch",
        expects="better accuracy on unseen data",
        docs="methods/batch_augmentation",
    )

    def __init__(
        self,
        transforms: list[Transform],
        input_key: int | str = 0,
        target_key: int | str | None = 1,
        seed: int | None = None,
    ) -> None:
        if not isinstance(transforms, (list, tuple)):
            raise TypeError(f"Expected `transforms` to be a list of transforms, but got {transforms!r}.")
        if not transforms:
            raise ValueError("Expected `transforms` to have at least one transform, but got [].")
        for transform in transforms:
            if not isinstance(transform, Transform):
                raise TypeError(f"Expected `transforms` to be a list of transforms, but one of them is {transform!r}.")
        super().__init__(seed=seed, transforms=list(transforms), input_key=input_key, target_key=target_key)
        self.transforms = list(transforms)
        self.input_key = input_key
        self.target_key = target_key

    @property
    def is_neutral(self) -> bool:
        """Whether every transform returns what it is given."""
        return all(transform.is_neutral for transform in self.transforms)

    def transform_batch(self, batch: Any, generator: torch.Generator) -> Any:
        """Apply the transforms."""
        new = augment_batch(batch, self.transforms, self.input_key, self.target_key, generator)
        self.watch(_find_target(new, self.target_key))
        return new
