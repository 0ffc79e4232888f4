"""Give a DeepSpeed engine the weights and the optimizer state of a checkpoint, whatever it was saved from.

Each rank fills its own flat partitions from the pieces that belong there, by the parameters' names. So the number of
ranks and the stage that saved the checkpoint do not matter, nor does it whether it is sharded or a plain one.
DeepSpeed's own conversion ("universal checkpoint") knows Adam only, gives all groups the options of the first one, and
writes a second copy of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_accel.hooks.atomic import CheckpointError
from lightning_accel.strategies.zero_shards import LazyStateDict

__all__ = ["OptimizerSource", "PlainOptimizer", "check_names", "ids_on_disk", "restore_optimizer", "restore_weights"]


class OptimizerSource(Protocol):
    """Optimizer state by the parameters' names: a :class:`ZeroShards` or a :class:`PlainOptimizer`."""

    @property
    def groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        """The options and the names of each group."""

    def state_keys(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """Keys with a value for each element of a parameter, and the others with their value."""

    def piece(self, name: str, start: int, numel: int, key: str | None = None) -> Tensor:
        """A part of such a state, flattened."""


class PlainOptimizer:
    """The optimizer state in a plain checkpoint, which knows the parameters by their position in the groups.

    Args:
        saved: A ``state_dict`` of a ``torch.optim.Optimizer``.
        names: The names of the trained parameters of each group of this run.
        shapes: Their shapes.

    Raises:
        CheckpointError: If it is of other groups, or has a state that can't be split.
    """

    def __init__(self, saved: dict[str, Any], names: list[list[str]], shapes: Mapping[str, torch.Size]) -> None:
        self.groups: list[tuple[dict[str, Any], list[str]]] = []
        self._states: dict[str, dict[str, Any]] = {}
        if len(saved["param_groups"]) != len(names):
            raise CheckpointError(f"it has {len(saved['param_groups'])} groups, but this optimizer has {len(names)}")
        for index, (group, members) in enumerate(zip(saved["param_groups"], names, strict=True)):
            ids = group["params"]
            if len(ids) != len(members):  # frozen parameters have no state, and are not in the engine's groups
                ids = [number for number in ids if saved["state"].get(number)]
            if len(ids) != len(members):
                raise CheckpointError(f"its group {index} has {len(ids)} parameters, but this one has {len(members)}")
            options = {key: value for key, value in group.items() if key != "params"}
            self.groups.append((options, members))
            self._states.update(
                {name: saved["state"].get(number, {}) for name, number in zip(members, ids, strict=True)}
            )
        for name, state in self._states.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != shapes[name]:
                    raise CheckpointError(f"its {key!r} of {name!r} has the shape {tuple(value.shape)}")

    def state_keys(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """The keys with a value for each element, and the other entries."""
        state = self._states[name]
        elementwise = [key for key, value in state.items() if isinstance(value, Tensor) and value.dim()]
        return elementwise, {key: value for key, value in state.items() if key not in elementwise}

    def piece(self, name: str, start: int, numel: int, key: str | None = None) -> Tensor:
        """A part of a state, flattened."""
        assert key is not None
        value: Tensor = self._states[name][key]
        return value.flatten()[start : start + numel]


@dataclass(frozen=True)
class _Flat:
    """A flat partition of this rank, and which part of which parameter lies where in it."""

    index: int
    group: int
    master: Tensor
    parts: list[tuple[str, int, int, int]]  # name, offset in the partition, start in the parameter, number of elements


def _flats(engine: Any) -> list[_Flat]:
    optimizer = engine.optimizer
    found = []
    if engine.zero_optimization_partition_weights():
        for index, parameters in enumerate(optimizer.fp16_groups):
            parts = []
            for parameter in parameters:
                _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = min(engine.global_rank * size, parameter.ds_numel)
                numel = min(size, parameter.ds_numel - start)
                parts.append((engine.param_names[parameter], offset, start, numel))
            group = optimizer.sub_group_to_group_id[index]
            found.append(_Flat(index, group, optimizer.fp32_partitioned_groups_flat[index], parts))
        return found
    for group, parameters in enumerate(optimizer.bit16_groups):
        parts = []
        for parameter in parameters:
            if (at := parameter._hp_mapping) is not None:  # else it lies on other ranks
                here, there = at.hp_fragment_address, at.lp_fragment_address
                parts.append((engine.param_names[parameter], here.start, there.start, there.numel))
        found.append(_Flat(group, group, optimizer.single_partition_of_fp32_groups[group], parts))
    return found


def group_names(engine: Any) -> list[list[str]]:
    """The names of the trained parameters in each group of the engine's optimizer, in the caller's order."""
    optimizer = engine.optimizer
    if not engine.zero_optimization_partition_weights():
        return [[engine.param_names[parameter] for parameter in group] for group in optimizer.bit16_groups]
    names: list[list[str]] = [[] for _ in optimizer.optimizer.param_groups]
    for index, group in enumerate(optimizer.fp16_groups):
        names[optimizer.sub_group_to_group_id[index]] += [engine.param_names[parameter] for parameter in group]
    return names


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also of one that stage 3 has split."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def check_names(module: nn.Module, weights: Mapping[str, Any], *, strict: bool) -> None:
    """Compare the names and shapes of a checkpoint with those of a module, in which nothing has been changed yet.

    Raises:
        RuntimeError: As ``load_state_dict`` does.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    expected = module.state_dict(keep_vars=True).keys()
    problems = []
    if strict and (missing := [name for name in expected if name not in weights]):
        problems.append(f"it lacks {', '.join(missing)}")
    if strict and (unknown := [name for name in weights if name not in expected]):
        problems.append(f"it has {', '.join(unknown)}, which the module has not")
    lazy = weights if isinstance(weights, LazyStateDict) else None
    for name, parameter in parameters.items():
        if name in weights:
            saved = lazy.shape(name) if lazy is not None else weights[name].shape
            if saved != shape_of(parameter):
                problems.append(f"{name} has the shape {tuple(saved)}, but here {tuple(shape_of(parameter))}")
    if problems:
        raise RuntimeError(
            f"The checkpoint does not fit {type(module).__name__}: {'; '.join(problems)}. Use the module that it was "
            "saved from, or set `strict_loading = False` in it where names may differ."
        )


@torch.no_grad()
def restore_weights(engine: Any, module: nn.Module, weights: Mapping[str, Any], *, training: bool) -> None:
    """Give an engine's module its weights and buffers, and the optimizer its fp32 copies.

    Args:
        engine: The DeepSpeed engine.
        module: Its module.
        weights: The module's ``state_dict``; entries may be missing.
        training: Whether the engine has an optimizer, whose partitions are filled instead of whole parameters.
    """
    own: set[str] = set()
    if training:
        own = {name for names in group_names(engine) for name in names}
        names = {parameter: name for name, parameter in module.named_parameters()}
        aliases = {
            name for name, parameter in module.named_parameters(remove_duplicate=False) if names[parameter] in own
        }
        with _whole_optimizer(engine):
            for flat in _flats(engine):
                with _in_memory(engine, flat):
                    for name, offset, start, numel in flat.parts:
                        if name in weights and numel:
                            flat.master.data[offset : offset + numel].copy_(_piece(weights, name, start, numel))
                    _update_parameters(engine, flat)
        own |= aliases
    _load_layers(module, weights, own, engine)


def _piece(weights: Mapping[str, Any], name: str, start: int, numel: int) -> Tensor:
    if isinstance(weights, LazyStateDict):
        return weights.piece(name, start, numel)
    value: Tensor = weights[name]
    return value.flatten()[start : start + numel]


@torch.no_grad()
def restore_optimizer(engine: Any, source: OptimizerSource) -> list[str]:
    """Give an engine's optimizer its state and its groups' options; return the names that the source has no state of.

    Raises:
        CheckpointError: If the groups are not the same number, or a state can't be split.
    """
    base = engine.optimizer.optimizer
    names = group_names(engine)
    if len(source.groups) != len(names):
        raise CheckpointError(
            f"The checkpoint's optimizer has {len(source.groups)} parameter groups, but this one has {len(names)}. "
            "Make the groups in `configure_optimizers` as they were."
        )
    known = {name for _, members in source.groups for name in members}
    lacking = [name for members in names for name in members if name not in known]
    flats = _flats(engine)
    states: dict[int, dict[str, Any]] = {}
    groups = [{**options, "params": []} for options, _ in source.groups]
    for index, flat in enumerate(flats):
        if not _on_disk(engine, flat):
            states[index] = _flat_state(flat, source, known, names[flat.group])
        groups[flat.group]["params"].append(index)
    with _base_groups(engine):
        base.load_state_dict({"state": states, "param_groups": groups})
    for flat in flats:
        if _on_disk(engine, flat):
            with _in_memory(engine, flat):
                base.state[flat.master] = _flat_state(flat, source, known, names[flat.group])
    if not engine.zero_optimization_partition_weights():
        engine.optimizer._link_all_hp_params()
    return lacking


def _flat_state(flat: _Flat, source: OptimizerSource, known: set[str], members: list[str]) -> dict[str, Any]:
    """The state of a flat partition, put together from its parameters'; padding is zero."""
    state: dict[str, Any] = {}
    # A rank with nothing but padding has the same keys as the others
    for name, offset, start, numel in flat.parts or [(members[0], 0, 0, 0)]:
        if name not in known:
            continue
        elementwise, scalars = source.state_keys(name)
        for key, value in scalars.items():
            state.setdefault(key, value.clone() if isinstance(value, Tensor) else value)
        for key in elementwise:
            if key not in state:
                state[key] = torch.zeros_like(flat.master)
            state[key][offset : offset + numel].copy_(source.piece(name, start, numel, key))
    return state


def ids_on_disk(engine: Any) -> list[str]:
    """What DeepSpeed names the files of the partitions by, where the optimizer's state is on NVMe."""
    if not engine.zero_nvme_offload_optimizer():
        return []
    return [flat.ds_id for flat in engine.optimizer.fp32_partitioned_groups_flat]


def _on_disk(engine: Any, flat: _Flat) -> bool:
    on_disk: bool = engine.zero_nvme_offload_optimizer() and engine.optimizer._swappable_optimizer_subgroup(flat.index)
    return on_disk


@contextmanager
def _in_memory(engine: Any, flat: _Flat) -> Iterator[None]:
    """A partition and its state that live on NVMe are in memory for a while, and then written back."""
    if not _on_disk(engine, flat):
        yield
        return
    swapper = engine.optimizer.optimizer_swapper
    swapper.swap_in_optimizer_state(parameter=flat.master)
    yield
    swapper.swap_out_optimizer_state(parameter=flat.master)


def _update_parameters(engine: Any, flat: _Flat) -> None:
    """Give the split parameters of stage 3 their values from the fp32 copies."""
    if not engine.zero_optimization_partition_weights():
        return
    optimizer = engine.optimizer
    low, parameters = optimizer.fp16_partitioned_groups_flat[flat.index], optimizer.fp16_partitioned_groups[flat.index]
    if low is None:  # on NVMe
        optimizer._partitioned_params_swap_out(flat.index)
        return
    low.data.copy_(flat.master.data)
    for parameter, value in zip(parameters, optimizer.unflatten(low, parameters), strict=True):
        parameter.data = value.data


class _whole_optimizer(AbstractContextManager[None]):
    """While the fp32 partitions are filled; afterwards whole parameters have their values too."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer

    def __enter__(self) -> None:
        if self.engine.zero_optimization_partition_weights():
            self.optimizer.checkpoint_event_prologue()  # nothing is gathered

    def __exit__(self, *error: Any) -> None:
        optimizer = self.optimizer
        if not self.engine.zero_optimization_partition_weights():
            optimizer.update_lp_params()
            return
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()


class _base_groups(AbstractContextManager[None]):
    """At stage 3 the base optimizer's groups are empty, but for its step and its state."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer if engine.zero_optimization_partition_weights() else None

    def __enter__(self) -> None:
        if self.optimizer is not None:
            self.optimizer._set_fp32_optimizer_param_groups()

    def __exit__(self, *error: Any) -> None:
        if self.optimizer is not None:
            self.optimizer._clear_fp32_optimizer_param_groups()


def _load_layers(module: nn.Module, weights: Mapping[str, Any], skip: set[str], engine: Any) -> None:
    """``load_state_dict`` layer by layer, so that no more than one of a split module's layers is whole at a time."""
    by_layer: dict[str, list[str]] = {}
    for key in weights:
        by_layer.setdefault(key.rpartition(".")[0], []).append(key)
    for prefix, layer in module.named_modules(remove_duplicate=False):
        keys = [key for key in by_layer.get(prefix, []) if key not in skip]
        if not keys:
            continue
        dotted = f"{prefix}." if prefix else ""
        parameters = [
            parameter for name, parameter in layer.named_parameters(recurse=False) if f"{dotted}{name}" not in skip
        ]
        errors: list[str] = []
        with _gathered(parameters):
            values, metadata = {key: weights[key] for key in keys}, {"version": layer._version}
            layer._load_from_state_dict(values, dotted, metadata, False, [], [], errors)
        if errors:
            raise RuntimeError(f"The checkpoint does not fit {type(module).__name__}: {'; '.join(errors)}")


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    # Every rank reads and writes the same values, buffers too; those of rank 0 are kept
    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    return gathered
