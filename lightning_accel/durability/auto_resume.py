"""AutoResume: a run that is started again goes on from its newest whole checkpoint, without being told which.

A launcher that restarts a run (``torchrun --max-restarts``, SLURM's requeue, a loop in a shell) runs the same command
again. What was being written when the run was killed is passed over.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_accel.hooks import AccelCallback, Contract
from lightning_accel.hooks.atomic import MANIFEST, is_complete
from lightning_accel.hooks.resume import on_resume_start

__all__ = ["AutoResume", "newest_checkpoint"]


def newest_checkpoint(folders: list[Path], pattern: str = "*.ckpt") -> tuple[Path | None, list[Path]]:
    """Find the checkpoint that was finished last.

    Args:
        folders: Where to look; their subfolders are not searched, and a folder may be missing.
        pattern: Which names are those of checkpoints (files or directories).

    Returns:
        The newest complete checkpoint (``None`` where there is none), and the newer ones that are not complete.
    """
    found = []
    for folder in dict.fromkeys(folders):
        for path in folder.glob(pattern):
            # a directory's own time changes with whatever is put into it later; its manifest is written last
            stamp = path / MANIFEST if (path / MANIFEST).is_file() else path
            try:
                found.append((stamp.stat().st_mtime_ns, path.name, path))
            except FileNotFoundError:  # a link to what is gone, or removed since
                continue
    incomplete: list[Path] = []
    for _, _, path in sorted(found, reverse=True):
        if is_complete(path):
            return path, incomplete
        incomplete.append(path)
    return None, incomplete


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
        on_resume_start(self, trainer, partial(self._choose, trainer))

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
        return chosen


def _resumable(trainer: Trainer) -> list[ModelCheckpoint]:
    return [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and not callback.save_weights_only
    ]


def _look(folders: list[Path]) -> str | None:
    """Choose, and say so in one line."""
    newest, incomplete = newest_checkpoint([folder.absolute() for folder in folders])
    names = f" ({', '.join(path.name for path in incomplete)} not complete: passed over)" if incomplete else ""
    if newest is None:
        where = ", ".join(map(str, folders))
        rank_zero_info(f"AutoResume: no complete checkpoint in {where}, so the fit begins anew{names}.")
        return None
    age = time.time() - newest.stat().st_mtime
    rank_zero_info(f"AutoResume: going on from {newest}, written {age:.0f} s ago{names}.")
    return str(newest)
