"""AutoResume: a run that is started again goes on from its newest whole checkpoint, without being told which.

A launcher that restarts a run (``torchrun --max-restarts``, SLURM's requeue, a loop in a shell) runs the same command
again. What was being written when the run was killed is passed over, and so is what no fit can go on from.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_accel.durability.checkpoint_head import why_not_resumable
from lightning_accel.hooks import AccelCallback, Contract
from lightning_accel.hooks.atomic import MANIFEST, is_complete
from lightning_accel.hooks.resume import on_resume_start

__all__ = ["AutoResume", "newest_checkpoint"]

_NAMED = 5  # how many that were passed over are named


def newest_checkpoint(folders: list[Path], pattern: str = "*.ckpt") -> tuple[Path | None, dict[Path, str]]:
    """Find the checkpoint that was finished last and that a fit can go on from.

    Args:
        folders: Where to look; their subfolders are not searched, and a folder may be missing.
        pattern: Which names are those of checkpoints (files or directories).

    Returns:
        The newest checkpoint (``None`` where there is none) that is complete, Lightning's, and has more than weights;
        of those finished in the same moment, the one of the highest step. And the newer ones that were passed over,
        with the reason.
    """
    found: dict[int, list[Path]] = {}
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob(pattern)):
            # a directory's own time changes with whatever is put into it later; its manifest is written last
            stamp = path / MANIFEST if (path / MANIFEST).is_file() else path
            with contextlib.suppress(FileNotFoundError):  # a link to what is gone, or removed since
                found.setdefault(stamp.stat().st_mtime_ns, []).append(path)
    skipped: dict[Path, str] = {}
    for _, paths in sorted(found.items(), reverse=True):
        good = []
        for path in paths:
            reason, step = why_not_resumable(path) if is_complete(path) else ("is not complete", -1)
            if reason:
                skipped[path] = reason
            else:
                good.append((step, path))
        if good:
            return max(good)[1], skipped
    return None, skipped


class AutoResume(AccelCallback):
    """Resume from the newest complete checkpoint where the fit was given none.

    Rank 0 looks and all ranks do as it says; one line says what was chosen. Where there is no checkpoint yet, the fit
    begins as it would without this callback. A path that the fit was given is used as it is.

    Args:
        dirpath: The directory that checkpoints are in; by default those of the Trainer's ``ModelCheckpoint`` callbacks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning_accel import ExactResume
        >>> save = ModelCheckpoint("checkpoints", every_n_train_steps=100)
        >>> trainer = Trainer(callbacks=[AutoResume(), ExactResume(), save])  # doctest: +SKIP
        >>> trainer.fit(model)  # the first time and after every kill  # doctest: +SKIP
    """

    contract = Contract(
        purpose="Go on from the newest complete checkpoint when a run is started again.",
        touches=frozenset({"weights", "optimizer"}),
        acts="once, when the fit begins",
        expects="nothing lost but the steps since the last checkpoint",
        docs="methods/auto_resume",
        once=True,
    )

    def __init__(self, dirpath: str | None = None) -> None:
        if dirpath is not None and not isinstance(dirpath, (str, os.PathLike)):
            raise TypeError(f"Expected `dirpath` to be a path or None, but got {dirpath!r}.")
        dirpath = None if dirpath is None else os.fspath(dirpath)
        if dirpath is not None and (not dirpath or "://" in dirpath):
            raise ValueError(f"Expected `dirpath` to be the path of a local directory, but got {dirpath!r}.")
        super().__init__(dirpath=dirpath)
        self.dirpath = dirpath
        self._tracked: set[str] = set()  # what ModelCheckpoint callbacks will remove one day
        self._leftovers: list[str] = []
        self._chose = False

    @property
    def is_neutral(self) -> bool:
        """A run that is not started again is the plain run bit for bit."""
        return True

    @property
    def is_idle(self) -> bool:
        """It looks for a checkpoint when the fit begins."""
        return False

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that there is a place to look in, and look there when the fit begins."""
        if self.dirpath is None:
            self._check_model_checkpoints(trainer)
        self._tracked, self._leftovers, self._chose = set(), [], False
        on_resume_start(self, trainer, partial(self._choose, trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note which older checkpoints ModelCheckpoint removes once this one is there.

        A run that is killed between the two leaves them, and ModelCheckpoint's own state has forgotten them by then.
        """
        tracked = _tracked(trainer)
        given = {os.path.abspath(trainer.ckpt_path)} if trainer.ckpt_path else set()
        removed = self._tracked - tracked - given  # what the fit was told to resume from is never removed
        checkpoint.setdefault("callbacks", {})[self.state_key] = {"removed": sorted(removed)}
        self._tracked = tracked

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was to be removed until the fit has gone on."""
        if self._chose:
            self._leftovers = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("removed", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a kill kept ModelCheckpoint from removing, and let it remove what the fit resumed from."""
        if self._chose:
            trainer.ckpt_path = None  # ModelCheckpoint never removes this one, since a user may have named it
        self._tracked = _tracked(trainer)
        folders = {os.path.abspath(callback.dirpath) for callback in _model_checkpoints(trainer) if callback.dirpath}
        for path in self._leftovers:
            if os.path.dirname(path) in folders and path not in self._tracked and os.path.lexists(path):
                rank_zero_info(f"AutoResume: removing {path}, which the killed run was about to remove.")
                trainer.strategy.remove_checkpoint(path)
        self._leftovers = []

    def _check_model_checkpoints(self, trainer: Trainer) -> None:
        callbacks = _resumable(trainer)
        if not callbacks:
            raise MisconfigurationException(
                "AutoResume has no directory to look in: the Trainer has no ModelCheckpoint that saves more than "
                "weights. Add ModelCheckpoint(dirpath='checkpoints'), or set AutoResume(dirpath=...)."
            )
        for callback in callbacks:
            # this runs before ModelCheckpoint.setup, which fills an empty `dirpath` in
            if callback.dirpath is None and trainer.loggers:
                raise MisconfigurationException(
                    "AutoResume can't find the checkpoints of earlier starts: ModelCheckpoint has no `dirpath`, so "
                    "they go to the logger's directory, which is a new one at every start. Set "
                    "ModelCheckpoint(dirpath='checkpoints')."
                )
            if "://" in str(callback.dirpath):
                raise MisconfigurationException(
                    f"AutoResume looks in local directories, but ModelCheckpoint saves to {callback.dirpath!r}. Set "
                    "`dirpath` of ModelCheckpoint or of AutoResume to a local directory."
                )

    def _choose(self, trainer: Trainer, given: Any) -> Any:
        if given:
            if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
                rank_zero_warn(
                    f"The fit was given ckpt_path={str(given)!r}, so this restart begins again from there. Leave it "
                    "out to go on from the newest checkpoint."
                )
            return given
        folders = [self.dirpath] if self.dirpath else [str(callback.dirpath) for callback in _resumable(trainer)]
        chosen: str | None = None
        failure = ""
        if trainer.is_global_zero:
            try:
                chosen = _look([Path(folder) for folder in folders])
            except OSError as error:  # said by all ranks, or the others would wait for this one
                failure = str(error)
        chosen, failure = trainer.strategy.broadcast((chosen, failure))
        if failure:
            raise RuntimeError(f"AutoResume could not look for checkpoints in {', '.join(folders)}: {failure}")
        if chosen is not None and not trainer.strategy.reduce_boolean_decision(os.path.exists(chosen), all=True):
            raise RuntimeError(
                f"AutoResume chose {chosen} on rank 0, but not every rank has it. Save checkpoints in a directory that "
                "all machines share."
            )
        self._chose = chosen is not None
        return chosen


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _resumable(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in _model_checkpoints(trainer) if not callback.save_weights_only]


def _tracked(trainer: Trainer) -> set[str]:
    """The checkpoints that are there only until a better or a newer one is saved."""
    paths = set()
    for callback in _model_checkpoints(trainer):
        paths.add(callback.last_model_path)
        if callback.save_top_k != -1:
            paths |= {callback.best_model_path, *callback.best_k_models}
    return {os.path.abspath(path) for path in paths if path}


def _look(folders: list[Path]) -> str | None:
    """Choose, and say so in one line."""
    newest, skipped = newest_checkpoint([folder.absolute() for folder in folders])
    reasons = [f"{path.name}, which {reason}" for path, reason in skipped.items()]
    if len(reasons) > _NAMED:
        reasons[_NAMED:] = [f"{len(reasons) - _NAMED} more"]
    passed_over = f" (passed over: {'; '.join(reasons)})" if reasons else ""
    if newest is None:
        where = ", ".join(map(str, folders))
        rank_zero_info(f"AutoResume: no checkpoint to go on from in {where}, so the fit begins anew{passed_over}.")
        return None
    age = max(0.0, time.time() - newest.stat().st_mtime)
    rank_zero_info(f"AutoResume: going on from {newest}, written {age:.0f} s ago{passed_over}.")
    return str(newest)
