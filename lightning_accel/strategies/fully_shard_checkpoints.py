"""The checkpoints of FullyShardStrategy: directories of shards for any number of ranks, or one plain file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from lightning_accel.hooks.atomic import (
    MARK,
    CheckpointError,
    PartialCheckpoint,
    check_manifest,
    damage_error,
    find_damage,
    remove_checkpoint,
    write_beside,
)
from lightning_accel.strategies import sharded_state, sharding
from lightning_accel.strategies.zero_shards import say_kind

__all__ = ["FullyShardCheckpoints"]

_META = "meta.pt"  # Lightning's name for what is not sharded
_ROOT = "_fully_sharded_root"


class FullyShardCheckpoints(ModelParallelStrategy):
    """Saves and restores a sharded module; what shards it is in :class:`FullyShardStrategy`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._units: list[Any] = []  # what is gathered on its own, the root first
        self._directory: Path | None = None  # of the checkpoint that is being loaded
        self._weights_to_load: tuple[Path, bool] | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Callbacks are restored as early as under DDP; weights wait here until there are shards to load them into."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning asks for the state of the optimizers when it has made them."""
        return True

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _root(self) -> Any:
        return vars(self._module)[_ROOT]

    @_root.setter
    def _root(self, root: Any) -> None:
        vars(self._module)[_ROOT] = root  # not as a submodule: the module is inside the root

    @property
    def _is_sharded(self) -> bool:
        return _ROOT in vars(self._module)

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()  # does nothing where it is done

    def _sync_buffers(self) -> None:
        sharding.broadcast_values(self._module.buffers(), self.root_device)

    def _load_waiting_weights(self) -> None:
        if self._weights_to_load is not None:
            (path, strict), self._weights_to_load = self._weights_to_load, None
            sharded_state.load_weights(path, self._module, strict)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state: shards; or whole tensors, on rank 0 only, for a checkpoint of one file."""
        self._sync_buffers()
        state = self._module.state_dict()
        if self._save_distributed_checkpoint:
            return state
        gathered: dict[str, Any] = sharded_state.gather(state, self.root_device, self.is_global_zero)
        return gathered if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state: shards by parameter name; or whole tensors by number, for a checkpoint of one file."""
        self._reshard()
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state = optimizer.state_dict()
        if self._save_distributed_checkpoint:
            return sharded_state.name_optimizer_state(state, optimizer, self._module)
        gathered: dict[str, Any] = sharded_state.gather(state, self.root_device, self.is_global_zero)
        return gathered if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint beside its place and move it there when every rank is done."""
        if storage_options is not None:
            raise TypeError(
                f"Expected `storage_options` to be None with FullyShardStrategy, but got {storage_options!r}."
            )
        path = Path(self.broadcast(str(filepath)))
        if not self._save_distributed_checkpoint:
            self._on_rank_zero(partial(self._save_file, checkpoint, path))
            return
        sharded = {"state_dict": checkpoint.pop("state_dict")}
        for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
            sharded[f"optimizer_{number}"] = state
        begun: list[PartialCheckpoint] = []

        def begin() -> str:
            begun.append(PartialCheckpoint(path))
            return str(begun[0].folder)

        def end() -> None:
            mark = {"tied": sharded_state.tied_names(self._module), "ranks": self.world_size}
            torch.save({**checkpoint, MARK: mark}, begun[0].folder / _META)
            begun[0].publish()

        try:
            folder = self._on_rank_zero(begin)
            with sharded_state.explained(f"The checkpoint {path} could not be written"):
                save(sharded, checkpoint_id=folder)
            self._on_rank_zero(end)
        except BaseException:
            for unfinished in begun:
                unfinished.discard()
            raise

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, at once for whoever looks for one."""
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))

    def _save_file(self, checkpoint: dict[str, Any], path: Path) -> None:
        with write_beside(path) as file:
            self.checkpoint_io.save_checkpoint(checkpoint, file)

    def _on_rank_zero(self, function: Callable[[], Any]) -> Any:
        """What ``function`` gave on rank 0, on every rank; its error too, so that none waits for one that stopped."""
        result, error = None, None
        if self.is_global_zero:
            try:
                result = function()
            except Exception as caught:
                error = caught
        result, message = self.broadcast((result, None if error is None else f"{type(error).__name__}: {error}"))
        if message is not None:
            raise CheckpointError(f"Rank 0 could not write the checkpoint. {message}") from error
        return result

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint: of a directory what is not sharded, of a file everything.

        Raises:
            CheckpointError: On every rank, if a file of the directory is missing, truncated or changed.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        self._directory = None
        seen: list[Any] = [None] * self.world_size
        damage = find_damage(path, part=self.global_rank, parts=self.world_size)
        dist.all_gather_object(seen, (path.exists(), damage))
        if blind := [str(rank) for rank, (exists, _) in enumerate(seen) if not exists]:
            raise CheckpointError(f"{path} does not exist on rank {', '.join(blind)}. Every rank must see it.")
        if any(damage for _, damage in seen):
            raise damage_error(path, [sentence for _, damage in seen for sentence in damage])
        if not path.is_dir():
            return super(ModelParallelStrategy, self).load_checkpoint(path, weights_only=weights_only)
        if not (path / _META).is_file():
            raise CheckpointError(
                f"{path} is a directory without {_META}: it is none of FullyShardStrategy. {say_kind(path)}"
            )
        checkpoint: dict[str, Any] = torch.load(path / _META, map_location="cpu", weights_only=weights_only)
        check_manifest(path, checkpoint)
        saved_by = checkpoint.pop(MARK, {}).get("ranks", self.world_size)
        if saved_by != self.world_size:
            rank_zero_info(
                f"{path} was saved by {saved_by} rank(s), this run has {self.world_size}: each rank reads the part "
                "that is now its own."
            )
        self._directory = path
        if sharded_state.saved_optimizers(path):
            checkpoint["optimizer_states"] = []  # Lightning looks for them, and then asks for them by the method below
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of a file; those of a directory as soon as there are shards."""
        if self._directory is not None:
            self._weights_to_load = (self._directory, strict)
        elif self._is_sharded:
            state = sharded_state.shard_state_dict(checkpoint["state_dict"], self._module)
            self._module.load_state_dict(state, strict=strict)
        else:
            self._module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state of every optimizer."""
        self._reshard()
        for number, optimizer in enumerate(self.optimizers):
            if self._directory is not None:
                sharded_state.load_optimizer(self._directory, number, optimizer, self._module)
            else:
                state = checkpoint["optimizer_states"][number]
                optimizer.load_state_dict(sharded_state.shard_optimizer_state(state, optimizer))
