"""The checkpoints of ZeROStrategy: whole or not there, checked when they are read, and good for any number of ranks.

A checkpoint is the directory that DeepSpeed writes, with a manifest. It is read by
:mod:`lightning_accel.strategies.zero_restore`, in the same way whether the number of ranks and the stage are those of
the run that saved it or not; a plain Lightning checkpoint can be resumed from as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_accel.hooks.atomic import (
    MARK,
    CheckpointError,
    PartialCheckpoint,
    check_manifest,
    checksum,
    damage_error,
    find_damage,
    remove_checkpoint,
    write_beside,
)
from lightning_accel.strategies.zero_restore import (
    OptimizerSource,
    PlainOptimizer,
    check_names,
    group_names,
    ids_on_disk,
    restore_optimizer,
    restore_weights,
    shape_of,
)
from lightning_accel.strategies.zero_shards import ZeroShards, is_zero_checkpoint, load_without_trust, say_kind

__all__ = ["ZeROCheckpoints"]

T = TypeVar("T")


class ZeROCheckpoints(DeepSpeedStrategy):
    """The part of ZeROStrategy that saves and loads."""

    _source: ZeroShards | dict[str, Any] | None = None
    _source_path = Path()

    # ------------------------------------------------------------------------------------------------------- saving

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint directory beside its place, then move it there; every rank must call this.

        Args:
            checkpoint: Lightning's checkpoint. Where it has no ``optimizer_states``, none are written.
            filepath: The directory, on a file system that all ranks share.
            storage_options: Not supported.

        Raises:
            CheckpointError: On every rank, if one of them could not write. What was at ``filepath`` is still there.
        """
        if storage_options is not None:
            raise TypeError("Expected `storage_options` to be None: ZeROStrategy writes directories itself.")
        if "://" in str(filepath):
            raise MisconfigurationException(f"ZeROStrategy writes directories: use a local path, not {filepath}.")
        path = Path(self.broadcast(str(filepath)))
        engine: Any = self.model
        if isinstance(engine, LightningModule) or not hasattr(engine.optimizer, "state_dict"):
            self._save_weights(checkpoint, path)
            return
        gradients_saved = getattr(self.precision_plugin, "gradients_saved", False)
        if getattr(engine, "_unmanaged_backward_count", 0) and not gradients_saved:
            rank_zero_warn(
                f"{path} is saved in the middle of an accumulation window, without its partial gradients: a run that "
                "goes on from it is not exactly this one. Add ExactResume to the callbacks, and they are saved too; or "
                "save after an optimizer step (ModelCheckpoint(every_n_train_steps=...))."
            )
        partial: PartialCheckpoint | None = None
        with _on_every_rank(self, f"The checkpoint {path} could not be written") as failed:
            if self.is_global_zero:
                with failed.catch():
                    partial = PartialCheckpoint(path)
        writer = _ShardWriter(engine.checkpoint_engine, weights_only="optimizer_states" not in checkpoint)
        folder = Path(self.broadcast(str(partial.folder) if partial else ""))
        try:
            engine.checkpoint_engine = writer
            client_state = {k: v for k, v in checkpoint.items() if k not in _HEAVY}
            client_state[MARK] = {"on disk": ids_on_disk(engine)}
            try:
                engine.save_checkpoint(str(folder), tag="checkpoint", client_state=client_state)
            finally:
                engine.checkpoint_engine = writer.engine
            with _on_every_rank(self, f"The checkpoint {path} could not be written") as failed:
                failed.errors += writer.errors
            checksums = self._gather({file.relative_to(folder).as_posix(): n for file, n in writer.checksums.items()})
            with _on_every_rank(self, f"The checkpoint {path} could not be written") as failed:
                if partial:
                    with failed.catch():
                        partial.publish({name: value for part in checksums for name, value in part.items()})
        except BaseException:
            if partial:
                partial.discard()
            raise

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, at once for whoever looks for one."""
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Nothing for Lightning's checkpoint: the engine saves it."""
        return {}

    def _save_weights(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Write a plain checkpoint: there is no engine that trains."""
        assert self.lightning_module is not None
        if any(hasattr(parameter, "ds_id") for parameter in self.lightning_module.parameters()):
            raise MisconfigurationException(
                "ZeROStrategy can't save here: at stage 3 the weights are split, and this run has no optimizer to save "
                "them by. Save during the fit, with ModelCheckpoint(save_last=True), or evaluate at stage 2."
            )
        rank_zero_warn(
            f"{path} is a plain checkpoint without the optimizer's state, which is gone when the fit is over. To go on "
            "from a checkpoint, save it during the fit, with ModelCheckpoint(save_last=True)."
        )
        with _on_every_rank(self, f"The checkpoint {path} could not be written") as failed:
            if self.is_global_zero:
                with failed.catch(), write_beside(path) as file:
                    torch.save({key: value for key, value in checkpoint.items() if key != "optimizer_states"}, file)

    # ------------------------------------------------------------------------------------------------------ loading

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a ZeRO checkpoint, of any number of ranks and any stage, or a plain Lightning one.

        Args:
            checkpoint_path: A directory or a file that every rank sees.
            weights_only: Not needed: nothing is unpickled but plain objects and what torch was told to trust.

        Raises:
            CheckpointError: On every rank, if it is damaged, half-written or none; the message names the file.
        """
        path = self._source_path = Path(checkpoint_path)
        found = self._gather(find_damage(path, part=self.global_rank, parts=self.world_size))
        if any(found):
            raise damage_error(path, [sentence for sentences in found for sentence in sentences])
        with _on_every_rank(self, f"{path} can't be loaded") as failed, failed.catch():
            self._source = self._open(path)
        if isinstance(self._source, ZeroShards):
            shards, config = self._source, self._zero_config
            here = (self.world_size, config.get("stage", 0))
            if (shards.world_size, shards.stage) != here:
                rank_zero_info(
                    f"{path} was saved by {shards.world_size} rank(s) at stage {shards.stage}, this run has {here[0]} "
                    f"at stage {here[1]}: each rank reads the part that is now its own."
                )
            return {**_copied(shards.client_state), "state_dict": shards.state_dict()}
        assert self._source is not None
        rank_zero_info(f"{path} is a plain checkpoint: each rank reads the part that is its own.")
        return {**_copied({k: v for k, v in self._source.items() if k not in _HEAVY}), **_only(self._source, _HEAVY)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the module its weights, and in a fit the optimizer its state too."""
        module = self.lightning_module
        assert module is not None
        source, self._source = self._source, None
        engine: Any = self.model
        training = module.trainer.state.fn == TrainerFn.FITTING
        check_names(module, checkpoint["state_dict"], strict=strict)
        restore_weights(engine, module, checkpoint["state_dict"], training=training)
        if not training:
            return
        if isinstance(source, ZeroShards):
            model = source.model
            engine.global_steps, engine.skipped_steps = model["global_steps"], model["skipped_steps"]
            engine.global_samples = model.get("global_samples", 0)
            for key, value in source.scaler.items():
                setattr(engine.optimizer, key, value)
        optimizer = self._optimizer_source(checkpoint, source, engine, module)
        if optimizer is None:
            return
        with _on_every_rank(self, f"{self._source_path} can't be resumed from") as failed, failed.catch():
            if lacking := restore_optimizer(engine, optimizer):
                rank_zero_warn(
                    f"{self._source_path} has no optimizer state of {', '.join(lacking)}: they start with a fresh one."
                )

    def _optimizer_source(
        self, checkpoint: Mapping[str, Any], source: Any, engine: Any, module: LightningModule
    ) -> OptimizerSource | None:
        if isinstance(source, ZeroShards):
            return source
        saved = checkpoint.get("optimizer_states") or []
        if not saved:
            rank_zero_warn(f"{self._source_path} has no optimizer state: it starts afresh.")
            return None
        shapes = {name: shape_of(parameter) for name, parameter in module.named_parameters()}
        reason = f"it has {len(saved)} optimizers"
        if len(saved) == 1:
            try:
                return PlainOptimizer(saved[0], group_names(engine), shapes)
            except (CheckpointError, KeyError, TypeError) as error:
                reason = str(error)
        rank_zero_warn(f"The optimizer state in {self._source_path} was not restored: {reason}.")
        return None

    def _open(self, path: Path) -> ZeroShards | dict[str, Any]:
        if is_zero_checkpoint(path):
            shards = ZeroShards(path)
            check_manifest(path, shards.model)
            return shards
        if path.is_dir():
            raise CheckpointError(f"{path} is a directory, but no ZeRO checkpoint. {say_kind(path)}")
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist (every rank must see it).")
        loaded = load_without_trust(path)
        if not isinstance(loaded, dict) or "state_dict" not in loaded:
            raise CheckpointError(f"{path} is not a Lightning checkpoint: it has no `state_dict`.")
        return loaded

    @property
    def _zero_config(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        config: dict[str, Any] = self.config.get("zero_optimization", {})
        return config

    def _gather(self, value: T) -> list[T]:
        """The value of each rank, on each rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values


_HEAVY = ("state_dict", "optimizer_states")  # read when they are needed


def _only(mapping: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: mapping[key] for key in keys if key in mapping}


def _copied(value: Any) -> Any:
    """A copy that does not keep a file mapped."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


class _Failed:
    """What went wrong on this rank."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            self.errors.append(str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _on_every_rank(ranks: ZeROCheckpoints, what: str) -> Iterator[_Failed]:
    """Raise on every rank what went wrong on some of them, so that none waits for the others."""
    failed = _Failed()
    yield failed
    reports = ranks._gather(failed.errors)
    if any(reports):
        if all(report == reports[0] for report in reports):
            raise CheckpointError(" ".join([f"{what}.", *reports[0]]))
        lines = [f"rank {rank}: {error}" for rank, errors in enumerate(reports) for error in errors]
        raise CheckpointError(f"{what}. {' '.join(lines)}")


class _ShardWriter:
    """DeepSpeed's way to write a file, in a format that can be memory-mapped, and with errors kept for later.

    A rank that raised here would leave the others waiting in DeepSpeed's barriers.
    """

    def __init__(self, engine: Any, *, weights_only: bool) -> None:
        self.engine = engine
        self.weights_only = weights_only
        self.errors: list[str] = []
        self.checksums: dict[Path, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        file = Path(path)
        if self.weights_only:
            state_dict = _without_optimizer(state_dict)
        try:
            torch.save(state_dict, file)
            self.checksums[file] = checksum(file)
        except (OSError, RuntimeError) as error:
            file.unlink(missing_ok=True)
            self.errors.append(f"{file.name}: {error}".split("\n", 1)[0])


def _without_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """A shard with weights, and groups without state."""
    if not isinstance(shard := state.get("optimizer_state_dict"), dict):
        return state
    key: str = "optimizer_state_dict" if "optimizer_state_dict" in shard else "base_optimizer_state"
    return {**state, "optimizer_state_dict": {**shard, key: {**shard[key], "state": {}}}}
