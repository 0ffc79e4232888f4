"""The names under which `Trainer(strategy=...)` knows the strategies."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_accel.strategies.zero_config import ZERO_NAMES

__all__ = ["STRATEGY_NAMES", "register_strategies"]

_ZERO = "lightning_accel.strategies.zero.ZeROStrategy"
STRATEGY_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (_ZERO, arguments) for name, arguments in ZERO_NAMES.items()},
    "accel_fsdp2": ("lightning_accel.strategies.fully_shard.FullyShardStrategy", {}),
    "accel_fsdp2_offload": ("lightning_accel.strategies.fully_shard.FullyShardStrategy", {"offload": True}),
    "accel_ddp": ("lightning_accel.strategies.ddp.RestartableDDPStrategy", {}),
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
