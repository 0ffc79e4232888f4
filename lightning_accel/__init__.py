"""Callbacks and strategies that make any LightningModule train faster, in less memory, or end up smaller."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_accel.strategies.registry import register_strategies

if TYPE_CHECKING:
    from lightning_accel.accumulation.gradient_accumulation import GradientAccumulation
    from lightning_accel.accumulation.micro_batching import MicroBatching
    from lightning_accel.accumulation.noise_scale import NoiseScaleAccumulation
    from lightning_accel.augment.batch_augmentation import BatchAugmentation
    from lightning_accel.augment.label_smoothing import LabelSmoothing
    from lightning_accel.durability.auto_resume import AutoResume
    from lightning_accel.durability.exact_resume import ExactResume
    from lightning_accel.errors import NoEffectWarning
    from lightning_accel.optimizers.ema import EMA
    from lightning_accel.optimizers.fused import FusedOptimizer
    from lightning_accel.optimizers.gradient_clipping import GradientClipping
    from lightning_accel.optimizers.in_backward import OptimizerInBackward
    from lightning_accel.optimizers.low_bit import LowBitOptimizer
    from lightning_accel.optimizers.muon import Muon
    from lightning_accel.optimizers.sam import SAM
    from lightning_accel.optimizers.schedule_free import ScheduleFree
    from lightning_accel.pruning.gradual import GradualPruning
    from lightning_accel.schedules import Duration
    from lightning_accel.strategies.ddp import RestartableDDPStrategy
    from lightning_accel.strategies.fully_shard import FullyShardStrategy
    from lightning_accel.strategies.zero import ZeROStrategy
    from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy
    from lightning_accel.tuning.batch_size_finder import BatchSizeFinder
    from lightning_accel.tuning.learning_rate_finder import LearningRateFinder

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SAM",
    "AutoResume",
    "BatchAugmentation",
    "BatchSizeFinder",
    "Duration",
    "ExactResume",
    "FullyShardStrategy",
    "FusedOptimizer",
    "GradientAccumulation",
    "GradientClipping",
    "GradualPruning",
    "LabelSmoothing",
    "LearningRateFinder",
    "LowBitOptimizer",
    "MicroBatching",
    "Muon",
    "NoEffectWarning",
    "NoiseScaleAccumulation",
    "OptimizerInBackward",
    "RestartableDDPStrategy",
    "ScheduleFree",
    "ZeROStrategy",
    "ZeroRedundancyStrategy",
]

_HOME = {
    "AutoResume": "durability.auto_resume",
    "BatchAugmentation": "augment.batch_augmentation",
    "BatchSizeFinder": "tuning.batch_size_finder",
    "EMA": "optimizers.ema",
    "Duration": "schedules",
    "ExactResume": "durability.exact_resume",
    "FullyShardStrategy": "strategies.fully_shard",
    "FusedOptimizer": "optimizers.fused",
    "GradientAccumulation": "accumulation.gradient_accumulation",
    "GradientClipping": "optimizers.gradient_clipping",
    "GradualPruning": "pruning.gradual",
    "LabelSmoothing": "augment.label_smoothing",
    "LearningRateFinder": "tuning.learning_rate_finder",
    "LowBitOptimizer": "optimizers.low_bit",
    "MicroBatching": "accumulation.micro_batching",
    "Muon": "optimizers.muon",
    "NoEffectWarning": "errors",
    "NoiseScaleAccumulation": "accumulation.noise_scale",
    "OptimizerInBackward": "optimizers.in_backward",
    "RestartableDDPStrategy": "strategies.ddp",
    "SAM": "optimizers.sam",
    "ScheduleFree": "optimizers.schedule_free",
    "ZeROStrategy": "strategies.zero",
    "ZeroRedundancyStrategy": "strategies.zero_redundancy",
}

register_strategies()  # so that Trainer(strategy="accel_zero2") knows the names; the strategies are imported when made


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
