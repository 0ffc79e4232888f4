"""Read a ZeRO checkpoint directory piece by piece, whatever number of ranks and stage wrote it.

DeepSpeed saves the flat fp32 partition and the flat optimizer state of each rank. Here they are seen as what they mean:
for each parameter, by its name, its fp32 value and its optimizer state, any part of which can be read. The files are
memory-mapped, so that a rank reads its own part of a large checkpoint and nothing else, and no converted copy is needed
to go on with another number of ranks or another stage.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_accel.errors import require
from lightning_accel.hooks.atomic import MARK, CheckpointError

__all__ = ["LazyStateDict", "ZeroShards", "is_zero_checkpoint", "load_without_trust", "say_kind"]

# What DeepSpeed puts beside the caller's own entries into the file of rank 0
_ENGINE_KEYS = {
    *("module", "buffer_names", "param_shapes", "shared_params", "frozen_param_shapes", "frozen_param_fragments"),
    *("optimizer", "lr_scheduler", "data_sampler", "random_ltd", "universal_checkpoint_info", "ds_config"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_version"),
    "checkpoint_parallel_dimensions",
}


@dataclass(frozen=True)
class _Fragment:
    """Where a part of a parameter lies: elements ``start`` to ``start + numel`` of it, in a rank's flat partition."""

    rank: int
    flat: int
    offset: int
    start: int
    numel: int


def is_zero_checkpoint(path: Path) -> bool:
    """Whether a directory was written by a DeepSpeed engine."""
    return _folder(path) is not None


def say_kind(path: Path) -> str:
    """For an error: what a directory is that is not what it should be, and what to do with it."""
    if is_zero_checkpoint(path):
        kind = "ZeRO"
    elif (path / ".metadata").is_file():
        kind = "FullyShardStrategy, or of torch.distributed"
    else:
        return "Give the directory that ModelCheckpoint wrote, not one above or inside it."
    return (
        f"It is one of {kind}: make a plain file of it, which any strategy goes on from, with `lightning-accel "
        f"consolidate {path} OUT.ckpt`."
    )


def load_without_trust(file: Path, known: Sequence[type] = ()) -> Any:
    """Map a file of ``torch.save`` into memory, with ``weights_only=True``.

    Args:
        file: The file.
        known: Classes that it may have besides tensors and plain Python objects.

    Raises:
        CheckpointError: If it can't be read, or has objects of other classes.
    """
    try:
        with torch.serialization.safe_globals(list(known)):
            try:
                return torch.load(file, map_location="cpu", mmap=True)
            except RuntimeError as error:
                if "mmap can only be used with files saved with" not in str(error):
                    raise
                return torch.load(file, map_location="cpu")  # plain DeepSpeed writes the old format
    except pickle.UnpicklingError as error:
        unknown = re.search(r"(?:Unsupported global|Unsupported class|GLOBAL)[^.]*?([\w.]+\.\w+)", str(error))
        if unknown is None:  # not a checkpoint at all
            raise CheckpointError(f"{file} can't be read: it is not a file of torch.save.") from error
        reason = unknown[1]
        raise CheckpointError(
            f"{file} has objects of {reason}, which are not loaded without trust. If you trust it, name the class "
            "in torch.serialization.add_safe_globals, or set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(f"{file} can't be read ({reason}). Use another checkpoint.") from error


class ZeroShards:
    """A ZeRO checkpoint, seen by parameter.

    Args:
        path: The directory.

    Raises:
        CheckpointError: If a file is missing or can't be read.
    """

    def __init__(self, path: Path) -> None:
        folder = _folder(path)
        if folder is None:
            raise CheckpointError(f"{path} is not a ZeRO checkpoint: no model states are in it.")
        self.folder = folder
        first = folder / "mp_rank_00_model_states.pt"
        partitioned = not first.is_file()
        self._model_name = "zero_pp_rank_{}_mp_rank_00_model_states.pt" if partitioned else first.name
        self.model: dict[str, Any] = _load(self.folder / self._model_name.format(0))
        self.world_size = int(self.model["dp_world_size"])
        shards = [self._load_optimizer(rank) for rank in range(self.world_size)]
        self.stage = int(shards[0]["zero_stage"])
        self.shapes: dict[str, torch.Size] = {
            name: torch.Size(shape) for group in self.model["param_shapes"] for name, shape in group.items()
        }
        self._fragments: dict[str, list[_Fragment]] = {name: [] for name in self.shapes}
        if self.stage == 3:
            self._masters = [shard["fp32_flat_groups"] for shard in shards]
            self._optimizers = [shard["optimizer_state_dict"] for shard in shards]
            self._map_what_was_on_disk()
            self._index_stage_3()
        else:
            self._masters = [shard["single_partition_of_fp32_groups"] for shard in shards]
            self._optimizers = [shard["base_optimizer_state"] for shard in shards]
            self._index_stage_1_2([shard["param_slice_mappings"] for shard in shards])
        self.scaler = {
            key: shards[0][key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow") if key in shards[0]
        }
        for name, fragments in self._fragments.items():
            if sum(fragment.numel for fragment in fragments) != self.shapes[name].numel():
                raise CheckpointError(f"{path} lacks a part of the parameter {name!r}. Use another checkpoint.")

    def _load_optimizer(self, rank: int) -> dict[str, Any]:
        names = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for prefix in ("", "bf16_")]
        file = next((self.folder / name for name in names if (self.folder / name).is_file()), self.folder / names[0])
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing: the checkpoint was saved by {self.world_size} ranks and has a file of each."
            )
        loaded: dict[str, Any] = _load(file)["optimizer_state_dict"]
        return loaded

    def _index_stage_1_2(self, mappings: list[list[dict[str, Any]]]) -> None:
        # The partitions of the ranks, one after another, are the flat group: a parameter goes on where it ended.
        for rank, groups in enumerate(mappings):
            for flat, group in enumerate(groups):
                for name, place in group.items():
                    before = self._fragments[name]
                    start = before[-1].start + before[-1].numel if before else 0
                    before.append(_Fragment(rank, flat, place.start, start, place.numel))

    def _map_what_was_on_disk(self) -> None:
        """Of an optimizer on NVMe DeepSpeed saves its files, a raw one for each partition and each state of it."""
        ids = (self.model.get(MARK) or {}).get("on disk", [])
        for rank, (masters, optimizer) in enumerate(zip(self._masters, self._optimizers, strict=True)):
            for flat, group in enumerate(self.model["param_shapes"]):
                size = sum(-(-torch.Size(shape).numel() // self.world_size) for shape in group.values())
                if masters[flat].numel() or not size:
                    continue
                if not ids:
                    raise CheckpointError(
                        f"{self.folder} was saved by DeepSpeed itself from an optimizer on NVMe: go on with DeepSpeed, "
                        "and save with ZeROStrategy."
                    )
                folder = self.folder / "offloaded_tensors" / f"rank{rank:02d}"
                masters[flat] = _raw(folder / f"{ids[flat]}.tensor.swp", size)
                state = optimizer["state"].get(flat, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and not value.numel():
                        state[key] = _raw(folder / f"{key}-{ids[flat]}.tensor.swp", size)

    def _index_stage_3(self) -> None:
        # Each parameter is cut into equal parts, the last one padded.
        for rank in range(self.world_size):
            for flat, group in enumerate(self.model["param_shapes"]):
                offset = 0
                for name, shape in group.items():
                    total = torch.Size(shape).numel()
                    part = -(-total // self.world_size)
                    start = min(rank * part, total)
                    numel = min(part, total - start)
                    if numel:
                        self._fragments[name].append(_Fragment(rank, flat, offset, start, numel))
                    offset += part

    # ------------------------------------------------------------------------------------------------ what is in it

    @property
    def client_state(self) -> dict[str, Any]:
        """The entries of Lightning's checkpoint, without weights and optimizer states."""
        return {key: value for key, value in self.model.items() if key not in _ENGINE_KEYS}

    @property
    def groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        """The options and the parameters' names of each of the optimizer's groups."""
        names = [list(group) for group in self.model["param_shapes"]]
        found = []
        for index, group in enumerate(self._optimizers[0]["param_groups"]):
            options = {key: value for key, value in group.items() if key != "params"}
            flats = group["params"] if self.stage == 3 else [index]
            found.append((options, [name for flat in flats for name in names[flat]]))
        return found

    def state_keys(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """The optimizer state of a parameter: keys with a value for each element, and the others with their value.

        Raises:
            CheckpointError: If a state is neither a number nor a value for each element: it can't be cut anew.
        """
        if name not in self._fragments or not self._fragments[name]:
            return [], {}
        first = self._fragments[name][0]
        size = self._masters[first.rank][first.flat].numel()
        elementwise, scalars = [], {}
        for key, value in self._optimizers[first.rank]["state"].get(first.flat, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                scalars[key] = value
            elif value.dim() == 1 and value.numel() >= size:  # with the padding, which the masters are saved without
                elementwise.append(key)
            else:
                raise CheckpointError(
                    f"The optimizer state {key!r} in {self.folder} has no value for each element of {name!r} "
                    f"(its shape is {tuple(value.shape)}), so it can't be split for another number of ranks or another "
                    "stage. Resume as it was saved."
                )
        return elementwise, scalars

    def piece(self, name: str, start: int, numel: int, key: str | None = None) -> Tensor:
        """Read elements ``start`` to ``start + numel`` of a parameter, flattened, or of an optimizer state of it."""
        parts = []
        for at in self._fragments[name]:
            low, high = max(start, at.start), min(start + numel, at.start + at.numel)
            if low < high:
                flat = self._masters[at.rank][at.flat] if key is None else self._state(at, key)
                parts.append(flat.detach().narrow(0, at.offset + low - at.start, high - low))
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def full(self, name: str, key: str | None = None) -> Tensor:
        """Read a whole parameter, or an optimizer state of it."""
        return self.piece(name, 0, self.shapes[name].numel(), key).view(self.shapes[name])

    def _state(self, at: _Fragment, key: str) -> Tensor:
        value = self._optimizers[at.rank]["state"][at.flat][key]
        assert isinstance(value, Tensor)
        return value

    def state_dict(self) -> LazyStateDict:
        """The module's weights and buffers, each read when it is asked for; trained parameters in fp32."""
        frozen = self._frozen() if self.stage == 3 else {}
        shared = {alias: name for alias, name in (self.model.get("shared_params") or {}).items()}
        loaders: dict[str, Any] = {}
        for key, value in self.model["module"].items():
            name = shared.get(key, key)
            if name in self.shapes:
                loaders[key] = name
            else:
                loaders[key] = frozen.get(name, value)
        return LazyStateDict(self, loaders)

    def _frozen(self) -> dict[str, Tensor]:
        """What is not trained, put together from the parts of the ranks."""
        shapes = self.model.get("frozen_param_shapes") or {}
        if not shapes:
            return {}
        models = [self.model]
        models += [_load(self.folder / self._model_name.format(rank)) for rank in range(1, self.world_size)]
        parts = {name: [model["frozen_param_fragments"][name].flatten() for model in models] for name in shapes}
        return {name: torch.cat(parts[name])[: torch.Size(shape).numel()].view(shape) for name, shape in shapes.items()}


class LazyStateDict(MutableMapping[str, Any]):
    """A state_dict that reads an entry when it is asked for; entries can be replaced, as in a hook."""

    def __init__(self, shards: ZeroShards, entries: dict[str, Any]) -> None:
        self._shards = shards
        self._entries = entries  # a name of a trained parameter, or the value itself

    def trained(self, key: str) -> str | None:
        """The name under which the shards have an entry; ``None`` if it is not a trained parameter as it was saved."""
        entry = self._entries[key]
        return entry if isinstance(entry, str) else None

    def shape(self, key: str) -> torch.Size:
        """The shape of an entry, without reading it."""
        entry = self._entries[key]
        shape: torch.Size = self._shards.shapes[entry] if isinstance(entry, str) else entry.shape
        return shape

    def piece(self, key: str, start: int, numel: int) -> Tensor:
        """Elements ``start`` to ``start + numel`` of an entry, flattened."""
        entry = self._entries[key]
        if isinstance(entry, str):
            return self._shards.piece(entry, start, numel)
        flat: Tensor = entry.flatten()
        return flat[start : start + numel]

    def __getitem__(self, key: str) -> Any:
        entry = self._entries[key]
        return self._shards.full(entry) if isinstance(entry, str) else entry

    def __setitem__(self, key: str, value: Any) -> None:
        self._entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _folder(path: Path) -> Path | None:
    """The folder of the newest tag in a checkpoint directory."""
    latest = path / "latest"
    tag = latest.read_text().strip() if latest.is_file() else "checkpoint"
    folder = path / tag
    return folder if any(folder.glob("*mp_rank_*_model_states.pt")) else None


def _raw(file: Path, size: int) -> Tensor:
    """A file of fp32 numbers and nothing else, mapped into memory."""
    if not file.is_file() or file.stat().st_size < 4 * size:
        raise CheckpointError(f"{file} is missing, or too short. Use another checkpoint.")
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.float32)


def _load(file: Path) -> Any:
    """Load a file of DeepSpeed's, which has objects of a few classes of its own."""
    require("deepspeed", "deepspeed", "Reading a ZeRO checkpoint")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return load_without_trust(file, [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler])
