"""What must be so before a DeepSpeed engine is made; what is wrong on one rank is said on all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

__all__ = ["check_build_locks", "check_device", "check_same_module", "find_build_locks", "only_one", "raise_everywhere"]

STALE_SECONDS = 20 * 60
"""A build whose folder has not changed for so long is taken for dead: the slowest op takes six minutes on two cores."""


_OTHERS = "strategy='accel_fsdp2' or 'accel_ddp'"


def check_device(
    config: Mapping[str, Any], device: torch.device, devices: Sequence[torch.device], precision_plugin: Any
) -> None:
    """Refuse devices that DeepSpeed does not take, and what it does not do on this one.

    Raises:
        MisconfigurationException: With the way out.
    """
    if device.type == "cuda":
        if (indices := [other.index for other in devices]) != list(range(len(devices))):
            raise MisconfigurationException(
                f"DeepSpeed takes the GPUs from 0 on, but got {indices}. Choose them with CUDA_VISIBLE_DEVICES, and "
                "set Trainer(devices=N)."
            )
        return
    precision = getattr(precision_plugin, "precision", "")
    if precision in ("16-mixed", "16-true"):
        raise MisconfigurationException(
            f"precision={precision!r} is float16 throughout in DeepSpeed, which it does not support on the CPU. "
            "Use precision='bf16-mixed'."
        )
    zero = config["zero_optimization"]
    cuda_only = {
        "zero_plus_plus.quantized_weights": zero.get("zero_quantized_weights"),
        "zero_plus_plus.quantized_nontrainable_weights": zero.get("zero_quantized_nontrainable_weights"),
        "zero_plus_plus.quantized_gradients": zero.get("zero_quantized_gradients"),
        "offload_optimizer.super_offload": zero.get("offload_optimizer", {}).get("super_offload"),
    }
    for name, used in cuda_only.items():
        if used:
            raise MisconfigurationException(
                f"ZeROStrategy({name}) needs kernels that DeepSpeed has for CUDA alone, but this run is on the CPU. "
                "Leave it out, or set Trainer(accelerator='cuda')."
            )


def check_build_locks(config: Mapping[str, Any], device: torch.device) -> None:
    """Say so where an earlier build of an op never ended: the next one would wait for it for ever.

    Raises:
        MisconfigurationException: On every rank, if that is likely and this run compiles an op.
    """
    zero = config["zero_optimization"]
    offload = {zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}
    if offload == {"none"} and device.type == "cpu":
        return
    problem = None
    for lock, stale in find_build_locks():
        message = (
            f"{lock} says that {lock.parent.name} is being compiled. If no build is running (one that was killed "
            f"leaves it there), every later one waits for it: remove it with `rm {lock}`."
        )
        if stale and ("nvme" in offload or "optimizer" in config):
            problem = message
        else:
            rank_zero_warn(message)
    raise_everywhere(problem)


def only_one(optimizers: Sequence[Optimizer]) -> Optimizer:
    """The optimizer, of a list of one.

    Raises:
        MisconfigurationException: If there are more, or none.
    """
    if len(optimizers) > 1:
        raise MisconfigurationException(
            f"ZeRO's engine splits and steps one optimizer, but `configure_optimizers` returned {len(optimizers)}. "
            f"Make them parameter groups of one, or use {_OTHERS}, which take several."
        )
    if not optimizers or not any(group["params"] for group in optimizers[0].param_groups):
        raise MisconfigurationException(
            f"ZeRO needs an optimizer, but `configure_optimizers` returned none. Return one, or use {_OTHERS}."
        )
    return optimizers[0]


def raise_everywhere(problem: str | None) -> None:
    """Raise on every rank what is wrong on one, so that none waits for it.

    Raises:
        MisconfigurationException: If there is a problem on any rank.
    """
    problems: list[str | None] = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise MisconfigurationException(found if len(problems) == 1 else f"On rank {rank}: {found}")


def check_same_module(module: nn.Module) -> None:
    """Refuse ranks whose modules differ in a parameter's name, shape, type, or whether it is trained.

    Raises:
        MisconfigurationException: On every rank, naming the first difference.
    """
    own = [
        f"{name} {tuple(getattr(parameter, 'ds_shape', parameter.shape))} {parameter.dtype} "
        f"{'trained' if parameter.requires_grad else 'frozen'}"
        for name, parameter in module.named_parameters()
    ]
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256("\n".join(own).encode()).digest())
    if len(set(digests)) == 1:
        return
    every: list[Any] = [None] * len(digests)
    dist.all_gather_object(every, own)
    rank = next(rank for rank, other in enumerate(every) if other != every[0])
    first, other = every[0], every[rank]
    place = next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
    a, b = (names[place] if place < len(names) else "nothing more" for names in (first, other))
    raise MisconfigurationException(
        f"The modules of the ranks differ: parameter {place} is '{a}' on rank 0 and '{b}' on rank {rank}. Build the "
        "same module on every rank, from the same arguments."
    )


def find_build_locks(now: float | None = None) -> list[tuple[Path, bool]]:
    """Locks in the folder where torch compiles ops, and whether the build that made each is likely dead."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    now = time.time() if now is None else now
    found = []
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        try:
            changed = max(file.stat().st_mtime for file in [lock, *lock.parent.iterdir()])
        except OSError:  # the build ended just now
            continue
        found.append((lock, now - changed > STALE_SECONDS))
    return found
