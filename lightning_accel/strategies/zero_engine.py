"""Around a DeepSpeed engine: groups that are gone, ranks that disagree, compiled ops, and the module afterwards."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

__all__ = [
    "ModuleState",
    "check_same_module",
    "compiled_ops_explained",
    "find_build_locks",
    "forget_stale_groups",
    "raise_everywhere",
]

STALE_SECONDS = 20 * 60
"""A build whose folder has not changed for so long is taken for dead: the slowest op takes six minutes on two cores."""


def forget_stale_groups() -> None:
    """Drop DeepSpeed's handles of process groups that ended with an earlier run in this process."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    if dist.is_initialized():
        try:
            dist.get_rank(groups._WORLD_GROUP)
            return
        except ValueError:  # made for a group that was destroyed since
            pass
    groups._release_process_group_references()
    comm.cdb = None


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


@contextmanager
def compiled_ops_explained() -> Iterator[None]:
    """Say what to do where DeepSpeed could not compile an op.

    Raises:
        MisconfigurationException: In place of the compiler's error.
    """
    try:
        yield
    except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError) as error:
        text = str(error)
        signs = ("JIT load", "Error building extension", "Ninja is required", "ninja", "c++", "'g++'", "libaio")
        if not any(sign in text for sign in signs):
            raise
        raise MisconfigurationException(
            "DeepSpeed compiles this op when it is first used, and could not. It needs a C++ compiler and ninja "
            "(apt-get install g++; pip install ninja), and libaio for NVMe (apt-get install libaio-dev). Without a "
            "compiler, offload with an optimizer of torch.optim instead of one of DeepSpeed. The error: "
            f"{text.strip()[:500]}"
        ) from error


class ModuleState:
    """What DeepSpeed adds to a module and its parameters, to be taken away again.

    Take one before the engine is made, call :meth:`made` right after, and :meth:`restore` once it is destroyed.
    """

    _HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
              "_backward_hooks", "_backward_pre_hooks")  # fmt: skip

    def __init__(self, module: nn.Module) -> None:
        self.split_before = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
        self._module = module
        self._before = self._look()
        self._added: list[tuple[Any, set[str], list[tuple[Any, set[int]]]]] = []

    def _look(self) -> list[tuple[Any, set[str], list[tuple[Any, set[int]]]]]:
        modules = [
            (
                module,
                set(vars(module)),
                [(hooks, set(hooks)) for hooks in map(vars(module).get, self._HOOKS) if hooks is not None],
            )
            for module in self._module.modules()
        ]
        return [*modules, *((parameter, set(vars(parameter)), []) for parameter in self._module.parameters())]

    def made(self) -> None:
        """Note what the engine added."""
        for (thing, names, hooks), (_, names_now, hooks_now) in zip(self._before, self._look(), strict=True):
            added = [(now, keys - before) for (_, before), (now, keys) in zip(hooks, hooks_now, strict=True)]
            self._added.append((thing, names_now - names, added))
        self._before = []

    def whole_parameters(self) -> dict[nn.Parameter, Tensor]:
        """Every parameter that stage 3 split, gathered, in main memory; all ranks must call this."""
        import deepspeed

        whole = {}
        for parameter in self._module.parameters():
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole[parameter] = parameter.detach().to("cpu", copy=True)
        return whole

    def restore(self, whole: dict[nn.Parameter, Tensor]) -> None:
        """Take away what was added, and give the parameters their values."""
        for thing, names, hooks in self._added:
            for name in names:
                vars(thing).pop(name, None)
            for handles, keys in hooks:
                for key in keys:
                    handles.pop(key, None)
            if isinstance(thing, nn.Module):
                thing._parameters = dict(thing._parameters)
        for parameter, value in whole.items():
            parameter.data = value
