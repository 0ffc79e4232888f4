"""State of sharded parameters: plain and sharded forms of it, and a directory of shards that any world size reads.

The directory has the format of torch's distributed checkpoint with Lightning's names: ``state_dict`` and
``optimizer_0``, ``optimizer_1``, ..., whose state is named by parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_accel.hooks.atomic import CheckpointError

__all__ = [
    "empty_groups",
    "explained",
    "gather",
    "load_optimizer",
    "load_weights",
    "name_optimizer_state",
    "saved_optimizers",
    "shard_like",
    "shard_optimizer_state",
    "shard_state_dict",
    "tied_names",
]


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Say in one sentence what went wrong on which rank; torch's error is no ``Exception``, and all tracebacks at once.

    Raises:
        CheckpointError: On every rank.
    """
    try:
        yield
    except CheckpointException as error:
        causes = [f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items()]
        raise CheckpointError(f"{what}. {' '.join(causes)}") from error


def shard_like(value: Tensor, like: DTensor) -> DTensor:
    """This rank's part of a whole tensor, split as ``like`` is; without communication."""
    mesh = like.device_mesh
    whole = DTensor.from_local(value.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    shard: Any = whole.redistribute(mesh, like.placements).to(like.device)
    return shard  # type: ignore[no-any-return]


def gather(value: Any, device: torch.device, keep: bool) -> Any:
    """Gather the sharded tensors in ``value``, on the CPU; every rank takes part.

    Args:
        value: Dictionaries and lists of anything.
        device: Where ranks communicate.
        keep: Whether this rank is to have the result; others get ``None`` in the place of tensors.
    """
    if isinstance(value, DTensor):
        sharded: Any = value.detach().to(device)
        value = sharded.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gather(item, device, keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Tensor, Mapping, list, tuple)) for item in value):
        return type(value)(gather(item, device, keep) for item in value)
    return value


def shard_state_dict(state_dict: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A plain state dict of a module in the form in which the sharded module loads it."""
    own = module.state_dict()
    return {name: _shard_if_split(value, own.get(name)) for name, value in state_dict.items()}


def _shard_if_split(value: Any, like: Any) -> Any:
    fits = isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape
    return shard_like(value, like) if fits else value


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def shard_optimizer_state(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A plain state dict of an optimizer in the form in which the optimizer of sharded parameters loads it."""
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    of_index = dict(zip(indices, _parameters(optimizer), strict=False))  # torch tells where the numbers differ
    state = {}
    for index, entries in state_dict["state"].items():
        state[index] = {name: _shard_if_split(value, of_index.get(index)) for name, value in entries.items()}
    return {**state_dict, "state": state}


def name_optimizer_state(state_dict: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """A state dict of an optimizer with the names of parameters in the place of their numbers."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    name_of = {index: names[parameter] for index, parameter in zip(indices, _parameters(optimizer), strict=True)}
    return {
        "state": {name_of[index]: entries for index, entries in state_dict["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[index] for index in group["params"]]} for group in state_dict["param_groups"]
        ],
    }


def tied_names(module: nn.Module) -> dict[str, str]:
    """The further names of parameters that have several, with the first one of each."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first.setdefault(parameter, name)
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in every if first[parameter] != name}


def _saved_entries(path: Path) -> dict[str, Any]:
    entries: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    return entries


def saved_optimizers(path: Path) -> int:
    """How many optimizers have their state in the directory."""
    return len({key.split(".")[0] for key in _saved_entries(path) if key.startswith("optimizer_")})


def load_weights(path: Path, module: nn.Module, strict: bool = True) -> None:
    """Load a directory of shards into a module, each rank its own part.

    Raises:
        RuntimeError: If names or shapes differ (names only if ``strict``), as ``load_state_dict`` does.
    """
    prefix = "state_dict."
    saved = {key.removeprefix(prefix): entry for key, entry in _saved_entries(path).items() if key.startswith(prefix)}
    own = module.state_dict()
    wrong = [
        f"size mismatch for {name}: {tuple(saved[name].size)} in the checkpoint, {tuple(own[name].shape)} in the module"
        for name in own
        if isinstance(saved.get(name), TensorStorageMetadata) and saved[name].size != own[name].shape
    ]
    if strict:
        wrong += [f"missing in the checkpoint: {name}" for name in own if name not in saved]
        wrong += [f"not in the module: {name}" for name in saved if name not in own]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise RuntimeError(f"{path} is no checkpoint of this {type(module).__name__}: {'; '.join(wrong[:5])}{more}.")
    state = {"state_dict": {name: value for name, value in own.items() if name in saved}}
    with explained(f"{path} can't be loaded"):
        load(state, checkpoint_id=path)
    module.load_state_dict(state["state_dict"], strict=False)


def empty_groups(entries: Mapping[str, Any], key: str) -> Any:
    """Where to load ``param_groups`` into: they were saved as one object, or (torch >= 2.8) each option by itself."""
    if key in entries:
        return None
    groups: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if entry.startswith(f"{key}."):
            number, _, option = entry.removeprefix(f"{key}.").partition(".")
            groups.setdefault(int(number), {})[option] = None
    return [groups[number] for number in sorted(groups)]


def load_optimizer(path: Path, number: int, optimizer: Optimizer, module: nn.Module) -> None:
    """Load the state of one optimizer from a directory of shards, each rank its own part.

    Raises:
        RuntimeError: If the directory has no state of this optimizer.
    """
    entries = _saved_entries(path)
    names = {parameter: name for name, parameter in module.named_parameters()}
    root = f"optimizer_{number}"
    groups = empty_groups(entries, f"{root}.param_groups")
    if groups == []:
        raise RuntimeError(f"{path} has no state of optimizer {number}: it was saved with fewer optimizers.")
    by_owner: dict[str, list[str]] = {}
    for key in entries:
        if key.startswith(f"{root}.state."):
            owner, _, name = key.removeprefix(f"{root}.state.").rpartition(".")
            by_owner.setdefault(owner, []).append(name)
    state: dict[str, dict[str, Any]] = {}
    for parameter in _parameters(optimizer):
        for name in by_owner.get(names[parameter], ()):
            entry = entries[f"{root}.state.{names[parameter]}.{name}"]
            empty: Any = None
            if isinstance(entry, TensorStorageMetadata):
                dtype = entry.properties.dtype
                if entry.size == parameter.shape:
                    empty = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
                else:
                    empty = torch.zeros(entry.size, dtype=dtype)
            state.setdefault(names[parameter], {})[name] = empty
    loaded: dict[str, Any] = {root: {"state": state, "param_groups": groups}}
    with explained(f"{path} can't be loaded"):
        load(loaded, checkpoint_id=path)
    loaded = loaded[root]
    number_of = {name: index for index, name in enumerate(names[parameter] for parameter in _parameters(optimizer))}
    optimizer.load_state_dict(
        {
            "state": {number_of[name]: values for name, values in loaded["state"].items()},
            "param_groups": [
                {**group, "params": [number_of[name] for name in group["params"]]} for group in loaded["param_groups"]
            ],
        }
    )
