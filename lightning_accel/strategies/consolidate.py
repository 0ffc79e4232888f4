"""Make one plain file of a sharded checkpoint: a ``.ckpt`` of Lightning's, or the weights as ``.safetensors``.

Neither the module nor any rank is needed. The output is laid out first and mapped into memory, then each tensor is read
straight into its place, so that memory holds a tensor or two at a time, whatever the size of the model.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_accel.hooks.atomic import (
    MARK,
    CheckpointError,
    check_manifest,
    damage_error,
    find_damage,
    write_beside,
)
from lightning_accel.strategies.zero_shards import ZeroShards, is_zero_checkpoint, load_without_trust, say_kind

__all__ = ["FORMATS", "Consolidated", "consolidate_checkpoint"]

FORMATS = (".ckpt", ".safetensors")
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Later:
    """A tensor that is read when there is a place for it."""

    key: Any
    shape: torch.Size
    dtype: torch.dtype


@dataclass
class Consolidated:
    """What was made."""

    kind: str
    """What it was made of."""
    tensors: int
    """Number of weights and buffers."""
    bytes: int
    """Size of the file."""
    notes: list[str] = field(default_factory=list)
    """What was left out, a sentence each."""


@dataclass
class _Source:
    kind: str
    tree: dict[str, Any]
    """Lightning's checkpoint, with :class:`Later` in the place of large tensors."""
    fill: Callable[[list[tuple[Any, Tensor]]], None]
    """Reads the tensors of the given keys into the given places."""
    notes: list[str] = field(default_factory=list)


def consolidate_checkpoint(path: Path, out: Path, *, overwrite: bool = False, optimizer: bool = True) -> Consolidated:
    """Write one plain file of a checkpoint.

    Args:
        path: A directory of ZeROStrategy, of Lightning's DeepSpeedStrategy, of FullyShardStrategy or of Lightning's
            ModelParallelStrategy; or a plain checkpoint.
        out: The file. Its ending says what it is: ``.ckpt``, which ``load_from_checkpoint`` and ``Trainer.fit`` read
            with ``weights_only=True``, or ``.safetensors``, the module's ``state_dict``.
        overwrite: Whether to replace a file that is there.
        optimizer: Whether the optimizer's state is in a ``.ckpt`` too, so that a run can go on from it.

    Returns:
        What was made.

    Raises:
        ValueError: If ``out`` has another ending, or lies in ``path``.
        FileExistsError: If ``out`` is there and is not to be replaced.
        CheckpointError: If ``path`` is no checkpoint, or a damaged one.
        OSError: If the file can't be written. What was at ``out`` is still there, and nothing half-written.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"Expected the output to end in {' or '.join(FORMATS)}, but got {out}.")
    if path.resolve() in [out.resolve(), *out.resolve().parents]:
        raise ValueError(f"Expected the output to lie outside of the checkpoint {path}, but got {out}.")
    if os.path.lexists(out) and not overwrite:
        raise FileExistsError(f"{out} is there already.")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if damage := find_damage(path):
        raise damage_error(path, damage)
    plain_weights = out.suffix == ".safetensors"
    source = _open(path, optimizer and not plain_weights)
    check_manifest(path, source.tree)
    source.tree.pop(MARK, None)
    weights = source.tree["state_dict"]
    try:
        with write_beside(out) as file:
            if plain_weights:
                _write_safetensors(file, source)
            else:
                _write_ckpt(file, source)
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where the disk is full
        reason = str(error).split("\n", 1)[0]
        raise OSError(f"{out} could not be written, and nothing of it is left: {reason}") from error
    return Consolidated(source.kind, len(weights), out.stat().st_size, source.notes)


def _open(path: Path, optimizer: bool) -> _Source:
    if is_zero_checkpoint(path):
        return _open_zero(path, optimizer)
    if (path / ".metadata").is_file():
        return _open_distributed(path, optimizer)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, but not a checkpoint. {say_kind(path)}")
    tree = load_without_trust(path)
    if not isinstance(tree, dict) or "state_dict" not in tree:
        raise CheckpointError(f"{path} is not a Lightning checkpoint: it has no `state_dict`.")
    if not optimizer:
        tree = {**tree, "optimizer_states": []} if "optimizer_states" in tree else tree
    return _Source("plain checkpoint", tree, lambda places: None)


# ------------------------------------------------------------------------------------------------------------- sources


def _open_zero(path: Path, optimizer: bool) -> _Source:
    shards = ZeroShards(path)
    weights = shards.state_dict()
    laters: dict[str, Later] = {}  # one for tied weights, which share their memory in the file too

    def later(key: str) -> Any:
        name = weights.trained(key)
        if name is None:
            return weights[key]
        return laters.setdefault(name, Later((name, None), shards.shapes[name], torch.float32))

    notes: list[str] = []
    tree = {**shards.client_state, "state_dict": {key: later(key) for key in weights}}
    if optimizer and "lr_schedulers" in tree:
        try:
            tree["optimizer_states"] = [_zero_optimizer(shards)]
        except CheckpointError as error:
            notes.append(f"The optimizer's state was left out. {error}")
    tree.setdefault("optimizer_states", [])

    def fill(places: list[tuple[Any, Tensor]]) -> None:
        for (name, key), place in places:
            place.copy_(shards.full(name, key))

    kind = f"ZeRO checkpoint of {shards.world_size} rank(s) at stage {shards.stage}"
    return _Source(kind, tree, fill, notes)


def _zero_optimizer(shards: ZeroShards) -> dict[str, Any]:
    """The optimizer's state as torch has it: parameters by their position."""
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for options, names in shards.groups:
        numbers = list(range(len(state), len(state) + len(names)))
        groups.append({**options, "params": numbers})
        for number, name in zip(numbers, names, strict=True):
            elementwise, scalars = shards.state_keys(name)
            dtypes = {key: shards.piece(name, 0, 1, key).dtype for key in elementwise}
            laters = {key: Later((name, key), shards.shapes[name], dtype) for key, dtype in dtypes.items()}
            # Each its own: ZeRO counts the steps of a whole group in one tensor, an optimizer would add to it for each
            own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in scalars.items()}
            state[number] = {**own, **laters}
    return {"state": {number: entries for number, entries in state.items() if entries}, "param_groups": groups}


def _open_distributed(path: Path, optimizer: bool) -> _Source:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_with_ranks

    from lightning_accel.strategies.sharded_state import empty_groups, explained

    def load(holder: dict[str, Any]) -> None:
        with warnings.catch_warnings(), explained(f"{path} can't be read"):
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
            load_with_ranks(holder, checkpoint_id=path, no_dist=True)

    entries = FileSystemReader(path).read_metadata().state_dict_metadata

    def read(key: str) -> Any:
        holder: dict[str, Any] = {key: None}
        load(holder)
        return holder[key]

    def entry(key: str) -> Any:
        found = entries[key]
        if isinstance(found, TensorStorageMetadata):
            return Later(key, found.size, found.properties.dtype)
        return read(key)

    def plain_optimizer(root: str) -> dict[str, Any]:
        holder: dict[str, Any] = {root: {"param_groups": empty_groups(entries, f"{root}.param_groups")}}
        load(holder)
        groups: list[dict[str, Any]] = []
        numbers: dict[str, int] = {}
        for group in holder[root]["param_groups"]:
            ids = {name: len(numbers) + index for index, name in enumerate(group["params"])}
            numbers.update(ids)
            groups.append({**group, "params": list(ids.values())})
        state: dict[int, dict[str, Any]] = {}
        for key in entries:
            if key.startswith(f"{root}.state."):
                name, _, what = key.removeprefix(f"{root}.state.").rpartition(".")
                state.setdefault(numbers[name], {})[what] = entry(key)
        return {"state": state, "param_groups": groups}

    prefix = "state_dict."
    meta = path / "meta.pt"
    tree: dict[str, Any] = dict(load_without_trust(meta)) if meta.is_file() else {}
    tree["state_dict"] = {key.removeprefix(prefix): entry(key) for key in entries if key.startswith(prefix)}
    if isinstance(mark := tree.get(MARK), Mapping):  # the same again, not an equal one
        tree["state_dict"].update(
            {alias: tree["state_dict"][name] for alias, name in mark["tied"].items() if alias in tree["state_dict"]}
        )
    if not tree["state_dict"]:
        raise CheckpointError(f"{path} has no weights under `state_dict`, where Lightning puts them.")
    tree["optimizer_states"], notes = [], []
    count = len({key.partition(".")[0] for key in entries if key.startswith("optimizer_")}) if optimizer else 0
    try:
        tree["optimizer_states"] = [plain_optimizer(f"optimizer_{number}") for number in range(count)]
    except KeyError as error:
        notes.append(f"The optimizer's state was left out: it is of {error}, which is in no parameter group.")

    def fill(places: list[tuple[Any, Tensor]]) -> None:
        first: dict[Any, Tensor] = {}
        for key, place in places:
            first.setdefault(key, place)
        load(first)
        for key, place in places:  # tied weights in a file that can't share them
            if place is not first[key]:
                place.copy_(first[key])

    return _Source("torch.distributed checkpoint", tree, fill, notes)


# ------------------------------------------------------------------------------------------------------------- outputs


def _write_ckpt(file: Path, source: _Source) -> None:
    """Save with the room for the tensors but not their data, then map the file and read them into it."""
    empty: dict[int, Tensor] = {}

    def place(value: Any) -> Any:
        if isinstance(value, Later):
            # Never touched, so it takes no memory
            return empty.setdefault(id(value), torch.empty(value.shape, dtype=value.dtype))
        return value

    with torch.serialization.skip_data():
        torch.save(_mapped(source.tree, place), file)
    _reserve(file, file.stat().st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        written = torch.load(file, mmap=True, weights_only=True)
    places: dict[int, tuple[Any, Tensor]] = {}
    for value, into in _pairs(source.tree, written):
        if isinstance(value, Later):
            places[id(value)] = (value.key, into)
        else:
            into.copy_(value)
    source.fill(list(places.values()))


def _write_safetensors(file: Path, source: _Source) -> None:
    """Write the header, then map the file and read the tensors into it (https://github.com/huggingface/safetensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors: dict[str, Any] = {}
    for name, value in source.tree["state_dict"].items():
        if not isinstance(value, (Tensor, Later)):
            source.notes.append(f"{name} was left out: it is not a tensor.")
        elif value.dtype not in _SAFETENSORS:
            raise CheckpointError(f"{name} is of {value.dtype}, which safetensors has no name for. Write a .ckpt.")
        else:
            tensors[name] = value
    end = 0
    # Large items first, so that each tensor begins at a multiple of its items' size
    for name, value in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        start, end = end, end + value.shape.numel() * value.dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    _reserve(file, base + end)
    mapped = torch.from_file(str(file), shared=True, size=base + end, dtype=torch.uint8)
    places = []
    for name, value in tensors.items():
        start, stop = header[name]["data_offsets"]
        into = mapped[base + start : base + stop].view(value.dtype).view(value.shape)
        if isinstance(value, Later):
            places.append((value.key, into))
        else:
            into.copy_(value)
    source.fill(places)


def _reserve(file: Path, size: int) -> None:
    """Take the room on the disk now: a full disk is an error here, but a crash (SIGBUS) when mapped memory is written.

    Raises:
        OSError: If there is not enough.
    """
    with file.open("r+b") as stream:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(stream.fileno(), 0, size)
        else:
            stream.truncate(size)


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(value, function) for value in tree)
    return function(tree)


def _pairs(tree: Any, written: Any) -> list[tuple[Any, Tensor]]:
    """The tensors of two trees of one shape."""
    if isinstance(tree, Mapping):
        return [pair for key, value in tree.items() for pair in _pairs(value, written[key])]
    if type(tree) in (list, tuple):
        return [pair for value, other in zip(tree, written, strict=True) for pair in _pairs(value, other)]
    return [(tree, written)] if isinstance(tree, (Tensor, Later)) else []
