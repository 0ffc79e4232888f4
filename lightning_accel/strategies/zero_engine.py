"""Around a DeepSpeed engine: its configuration, groups that are gone, compiled ops, its partitions, and the module."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

__all__ = [
    "ModuleState",
    "compiled_ops_explained",
    "forget_stale_groups",
    "mend_stage_3",
    "partitions_of",
    "run_config",
]


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


def run_config(base: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The engine's configuration for one run: a copy of the strategy's own, with what belongs to the Trainer."""
    config: dict[str, Any] = copy.deepcopy(dict(base))
    config["gradient_accumulation_steps"] = 1
    # `engine.step` reduces and steps, and only that; ZenFlow has windows of its own
    config["managed_gradient_accumulation"] = "zenflow" in config["zero_optimization"]
    config["gradient_clipping"] = 0.0  # set before each step, see ZeROPrecision
    if precision == "bf16-mixed":
        # Without "safe modules", whose gradients would be reduced in bfloat16, unlike DDP's
        autocast = {"lower_precision_safe_modules": [], **config.get("torch_autocast", {})}
        config["torch_autocast"] = {**autocast, "enabled": True, "dtype": "bfloat16"}
    elif precision == "bf16-true":
        config["bf16"] = {**config.get("bf16", {}), "enabled": True}
    elif precision in ("16-mixed", "16-true"):
        config["fp16"] = {**config.get("fp16", {}), "enabled": True}
    return config


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
        signs = (
            "failed to build/load",
            "JIT load",
            "Error building extension",
            "Ninja is required",
            "ninja",
            "c++",
            "'g++'",
            "libaio",
        )
        if not any(sign in text for sign in signs):
            raise
        raise MisconfigurationException(
            "DeepSpeed compiles this op when it is first used, and could not. It needs a C++ compiler and ninja "
            "(apt-get install g++; pip install ninja), and libaio for NVMe (apt-get install libaio-dev). Without a "
            "compiler, offload with an optimizer of torch.optim instead of one of DeepSpeed. The error: "
            f"{text.strip()[:500]}"
        ) from error


def mend_stage_3(engine: Any) -> None:
    """Mend what DeepSpeed 0.19 does wrong at stage 3."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    # The record of a step, by which it fetches ahead, is begun at each call of the module: the `self(x)` of a
    # `training_step`, a call within one, breaks it off, and every layer would be fetched alone, and waited for.
    offload.fwd_pre_hook.remove()
    offload.fwd_pre_hook = engine.register_forward_pre_hook(lambda *_: offload.get_param_coordinator().reset_step())
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    if swapper is not None:
        swapper._adjust_for_misaligned_lengths = partial(_split_gradients, swapper)


def _split_gradients(swapper: Any, tensors: Sequence[Tensor], offsets: Sequence[int]) -> tuple[list[Any], list[int]]:
    """The parts of gradients that go to a disk, or are too small for it and stay in memory.

    A gradient is read back to its place in the partition: what comes before a multiple of the disk's block there is
    made a small part, since the disk can't be read to such an address and DeepSpeed would see no error.
    """
    parts: list[Tensor] = []
    places: list[int] = []
    for tensor, offset in zip(tensors, offsets, strict=True):
        if swapper.is_swappable_tensor(tensor=tensor) and (ahead := -offset % swapper.numel_alignment):
            parts.append(tensor.narrow(0, 0, ahead))
            places.append(offset)
            tensor, offset = tensor.narrow(0, ahead, tensor.numel() - ahead), offset + ahead
        parts.append(tensor)
        places.append(offset)
    found: tuple[list[Any], list[int]] = type(swapper)._adjust_for_misaligned_lengths(swapper, parts, places)
    return found


def partitions_of(optimizer: Any, parameters: Sequence[Tensor]) -> list[tuple[int, Tensor, dict[str, Tensor]] | None]:
    """This rank's part of each parameter at stages 1 and 2: where it starts, the fp32 copy, and the optimizer's state.

    Args:
        optimizer: The engine's.
        parameters: Parameters of the module.

    Returns:
        Flat views, for each parameter; None for one that is stepped by other ranks, or by none.
    """
    group_of = {id(member): index for index, group in enumerate(optimizer.bit16_groups) for member in group}
    found: list[tuple[int, Tensor, dict[str, Tensor]] | None] = []
    for parameter in parameters:
        at = getattr(parameter, "_hp_mapping", None)
        if at is None:
            found.append(None)
            continue
        flat = optimizer.single_partition_of_fp32_groups[group_of[id(parameter)]]
        here = at.hp_fragment_address
        states = {
            name: value.narrow(0, here.start, here.numel)
            for name, value in optimizer.optimizer.state[flat].items()
            if isinstance(value, Tensor) and value.shape == flat.shape
        }
        found.append((at.lp_fragment_address.start, flat.narrow(0, here.start, here.numel), states))
    return found


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
            for name in [*names, *(name for name in vars(thing) if name.startswith("ds_"))]:
                vars(thing).pop(name, None)
            for handles, keys in hooks:
                for key in keys:
                    handles.pop(key, None)
            if isinstance(thing, nn.Module):
                thing._parameters = dict(thing._parameters)
        for parameter, value in whole.items():
            parameter.data = value
