"""The options of ZeRO as typed values, checked, and turned into the configuration that DeepSpeed reads.

Nothing here knows DeepSpeed or Lightning: dictionaries in, a new dictionary out, the caller's left as they were.

Papers: ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054), ZeRO-Offload (https://arxiv.org/abs/2101.06840),
ZeRO-Infinity (https://arxiv.org/abs/2104.07857), ZeRO++ (https://arxiv.org/abs/2306.10209), ZenFlow
(https://arxiv.org/abs/2505.12242).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lightning_accel.errors import check_choice

__all__ = [
    "ZERO_NAMES",
    "OffloadOptimizer",
    "OffloadParameters",
    "engine_config",
    "read_config",
]

ZERO_NAMES: dict[str, dict[str, Any]] = {
    "accel_zero1": {"stage": 1},
    "accel_zero2": {"stage": 2},
    "accel_zero3": {"stage": 3},
    "accel_zero2_offload": {"stage": 2, "offload_optimizer": "cpu"},
    "accel_zero3_offload": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "accel_zero3_nvme": {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
}
"""The registered names and the arguments of ``ZeROStrategy`` that each stands for."""


@dataclass
class OffloadOptimizer:
    """Where the optimizer's state and the master weights live."""

    device: Literal["none", "cpu", "nvme"] = "cpu"
    """Beside the parameters, in main memory, or on a disk."""
    nvme_path: str | None = None
    """The folder for ``nvme``."""


@dataclass
class OffloadParameters:
    """Where the parameters live between their uses (stage 3)."""

    device: Literal["none", "cpu", "nvme"] = "cpu"
    """On the accelerator, in main memory, or on a disk."""
    nvme_path: str | None = None
    """The folder for ``nvme``."""


def engine_config(
    stage: int | None,
    sections: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """DeepSpeed's configuration: the typed options over ``config``.

    Args:
        stage: 1, 2 or 3; None for what ``config`` says, or 2.
        sections: Of the arguments, by name.
        config: The caller's own DeepSpeed configuration; it is not changed.
    """
    merged = copy.deepcopy(dict(config))
    zero = merged.setdefault("zero_optimization", {})
    if stage is not None:
        zero["stage"] = check_choice("stage", stage, (1, 2, 3))
    zero.setdefault("stage", 2)
    for name, value in sections.items():
        options = {field.name: getattr(value, field.name) for field in fields(value)}
        if options["device"] != "none":
            zero[name] = {key: option for key, option in options.items() if option is not None}
    merged.setdefault("zero_allow_untested_optimizer", True)
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    merged.setdefault("train_micro_batch_size_per_gpu", 1)
    return merged


def read_config(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """A caller's configuration, from a dictionary or a JSON file."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    loaded: dict[str, Any] = json.loads(Path(config).read_text())
    return loaded
