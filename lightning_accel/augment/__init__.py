"""Augmentations of whole batches on the device, and the target that knows how it was changed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.augment.batch_augmentation import BatchAugmentation, augment_batch
    from lightning_accel.augment.cutmix import CutMix, cutmix_batch
    from lightning_accel.augment.label_smoothing import LabelSmoothing
    from lightning_accel.augment.mixup import MixUp, mixup_batch
    from lightning_accel.augment.random_crop import RandomCrop, crop_batch
    from lightning_accel.augment.random_horizontal_flip import RandomHorizontalFlip, flip_batch
    from lightning_accel.augment.target import MixedTarget, mix_targets, smooth_targets
    from lightning_accel.augment.transform import Transform

__all__ = [
    "BatchAugmentation",
    "CutMix",
    "LabelSmoothing",
    "MixUp",
    "MixedTarget",
    "RandomCrop",
    "RandomHorizontalFlip",
    "Transform",
    "augment_batch",
    "crop_batch",
    "cutmix_batch",
    "flip_batch",
    "mix_targets",
    "mixup_batch",
    "smooth_targets",
]

# Loaded when asked for: the transforms need torch alone, the callbacks Lightning.
_HOME = {
    "BatchAugmentation": "batch_augmentation",
    "CutMix": "cutmix",
    "LabelSmoothing": "label_smoothing",
    "MixUp": "mixup",
    "MixedTarget": "target",
    "RandomCrop": "random_crop",
    "RandomHorizontalFlip": "random_horizontal_flip",
    "Transform": "transform",
    "augment_batch": "batch_augmentation",
    "crop_batch": "random_crop",
    "cutmix_batch": "cutmix",
    "flip_batch": "random_horizontal_flip",
    "mix_targets": "target",
    "mixup_batch": "mixup",
    "smooth_targets": "target",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
