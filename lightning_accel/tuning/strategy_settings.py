"""From the ``strategy`` of a Trainer, as a configuration says it, to what it means for memory, and back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from lightning_accel.strategies.fully_shard import FullyShardStrategy
from lightning_accel.strategies.wrapping import check_blocks
from lightning_accel.strategies.zero import ZeROStrategy
from lightning_accel.strategies.zero_config import ZERO_NAMES, Communication, Stage3
from lightning_accel.strategies.zero_merge import as_section, engine_config, read_config
from lightning_accel.tuning.memory import STRATEGIES, Settings

__all__ = ["read_settings"]

_KEYS = {  # of DeepSpeed: what it is called here
    "reduce_bucket_size": "bucket",
    "stage3_param_persistence_threshold": "persistence",
    "stage3_max_live_parameters": "live",
    "sub_group_size": "sub_group",
}


def read_settings(strategy: Any) -> Settings:
    """Read what the strategies are told.

    Args:
        strategy: A name, or a mapping of ``class_path``, ``init_args`` and ``dict_kwargs``.

    Raises:
        ValueError: If an argument is wrong.
        TypeError: If one has the wrong type.
    """
    if not isinstance(strategy, Mapping):
        return Settings()
    name = str(strategy.get("class_path", "")).rpartition(".")[2]
    arguments = {
        key: value
        for part in ("init_args", "dict_kwargs")
        for key, value in (strategy.get(part) or {}).items()
        if value is not None
    }
    if name == "ZeROStrategy":
        return _zero(_changed(ZeROStrategy, arguments))
    if name == "FullyShardStrategy":
        arguments = _changed(FullyShardStrategy, arguments)
        written = {
            row: {"class_path": "lightning_accel.FullyShardStrategy", "init_args": {**arguments, "offload": offload}}
            for row, offload in (("accel_fsdp2", False), ("accel_fsdp2_offload", True))
        }
        return Settings(
            replicas=int(arguments.get("replicas", 1)),
            reshard=bool(arguments.get("reshard_after_forward", True)),
            blocks=check_blocks(arguments.get("blocks", "auto")),
            written=written,
        )
    if "DDP" in name and arguments:
        return Settings(bucket_view=bool(arguments.get("gradient_as_bucket_view")), written={"ddp": dict(strategy)})
    return Settings()


def _zero(arguments: dict[str, Any]) -> Settings:
    sections = {name: _section(arguments.get(name)) for name in ("communication", "stage3")}
    given = read_config(arguments.get("config"))
    # as stage 3, which takes all of them; the plan has a row for every stage
    given = {**given, "zero_optimization": {**given.get("zero_optimization", {}), "stage": 3}}
    merged = engine_config(
        3,
        as_section(Communication, sections["communication"]),
        as_section(Stage3, sections["stage3"]),
        config=given,
    )["zero_optimization"]
    written: dict[str, Any] = {}
    for row, own in ZERO_NAMES.items():
        kept: dict[str, Any] = {name: arguments[name] for name in arguments if name in ("trained_later", "timeout")}
        if sections["communication"]:
            kept["communication"] = dict(sections["communication"])
        if sections["stage3"] and own["stage"] == 3:
            kept["stage3"] = dict(sections["stage3"])
        if row in STRATEGIES and kept:
            written[row] = {"class_path": "lightning_accel.ZeROStrategy", "init_args": {**own, **kept}}
    sizes: dict[str, Any] = {ours: int(merged[key]) for key, ours in _KEYS.items() if key in merged}
    return Settings(written=written, **sizes)


def _changed(strategy: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not the strategy's defaults, which a parser fills in."""
    known = inspect.signature(strategy).parameters
    return {name: value for name, value in arguments.items() if name not in known or known[name].default != value}


def _section(value: Any) -> dict[str, Any] | None:
    """The options of a section that are set, of a mapping, or of one with a ``class_path``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if value and "class_path" in value:
        value = value.get("init_args")
    return {name: option for name, option in value.items() if option is not None} if value else None
