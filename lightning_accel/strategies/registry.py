"""The names under which `Trainer(strategy=...)` knows the strategies."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import TYPE_CHECKING, Any

from lightning_accel.strategies.zero_config import ZERO_NAMES

if TYPE_CHECKING:
    from lightning_accel.strategies.zero import ZeROStrategy
    from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy

__all__ = ["STRATEGY_NAMES", "register_strategies", "zero1"]

_HERE = "lightning_accel.strategies"
STRATEGY_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (f"{_HERE}.zero.ZeROStrategy", arguments) for name, arguments in ZERO_NAMES.items()},
    "accel_zero1": (f"{_HERE}.registry.zero1", {}),
    "accel_fsdp2": (f"{_HERE}.fully_shard.FullyShardStrategy", {}),
    "accel_fsdp2_offload": (f"{_HERE}.fully_shard.FullyShardStrategy", {"offload": True}),
    "accel_ddp": (f"{_HERE}.ddp.RestartableDDPStrategy", {}),
}
"""Each name, what makes the strategy, and the arguments it is made with."""


def register_strategies() -> None:
    """Register every name with Lightning; a name that is there already is left as it is."""
    from lightning.pytorch.strategies import StrategyRegistry

    for name, (path, arguments) in STRATEGY_NAMES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, _Maker(path), description=path.rpartition(".")[2], **arguments)


class _Maker:
    """Makes a strategy, whose module is imported only then."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, **arguments: Any) -> Any:
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)(**arguments)


def zero1(**options: Any) -> ZeROStrategy | ZeroRedundancyStrategy:
    """What ``accel_zero1`` is: ``ZeROStrategy(stage=1)``, or without deepspeed ``ZeroRedundancyStrategy``.

    Args:
        **options: Of the strategy that it is. ``trained_later`` goes with both: the second needs not be told.

    Raises:
        ImportError: If deepspeed is not installed, and an option is one that only it has.
    """
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.utilities import rank_zero_info

    from lightning_accel.strategies.zero import ZeROStrategy
    from lightning_accel.strategies.zero_redundancy import ZeroRedundancyStrategy

    if importlib.util.find_spec("deepspeed") is not None:
        return ZeROStrategy(stage=1, **options)
    options.pop("trained_later", None)
    known = inspect.signature(ZeROStrategy).parameters.keys() - inspect.signature(DDPStrategy).parameters.keys()
    if refused := sorted(known & options.keys()):
        raise ImportError(
            f"accel_zero1 without deepspeed knows no {', '.join(f'`{name}`' for name in refused)}: leave that out, or "
            "pip install 'lightning-accel[deepspeed]'."
        )
    rank_zero_info(
        "deepspeed is not installed: accel_zero1 is ZeroRedundancyStrategy, with the same numbers (torch's "
        "ZeroRedundancyOptimizer over DDP)."
    )
    return ZeroRedundancyStrategy(**options)
