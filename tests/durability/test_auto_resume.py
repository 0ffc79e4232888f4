"""AutoResume: which checkpoint is chosen, that a run started again ends as the uninterrupted one, and its refusals."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_accel import AutoResume, ExactResume
from lightning_accel.durability.auto_resume import newest_checkpoint
from lightning_accel.hooks.atomic import write_beside
from tests.durability.runs import Net, differences, fit, loader, outcome


class Killed(Exception):
    """Stands for a kill: it ends the fit between two batches."""


class KillAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def saver(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}", **options)


def start(folder: Path, *more: Callback, **options: Any) -> tuple[Trainer, Net]:
    callbacks = [AutoResume(), ExactResume(), saver(folder), *more]
    return fit(callbacks, loader, enable_checkpointing=True, **options)


def shorten(path: Path) -> None:
    """Leave half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    return caplog


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_started_again_it_ends_as_the_uninterrupted_run(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    whole = outcome(*start(tmp_path / "whole"))
    assert "no complete checkpoint" in info.text and "begins anew" in info.text
    folder = tmp_path / "killed"
    for step in (7, 12):  # in mid-epoch, and where an epoch begins
        with pytest.raises(Killed):
            start(folder, KillAt(step))
    shorten(folder / "step=12.ckpt")  # as if the kill had come while it was written
    info.clear()
    trainer, module = start(folder)
    (line,) = [line for line in info.messages if line.startswith("AutoResume")]
    assert line.startswith(f"AutoResume: going on from {folder / 'step=10.ckpt'}, written ")
    assert line.endswith("s ago (step=12.ckpt not complete: passed over).")
    assert module.seen, "nothing was trained after the restart"
    assert differences(whole, outcome(trainer, module)) == []
    assert trainer.global_step == 18


def test_a_given_path_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, info: pytest.LogCaptureFixture) -> None:
    start(tmp_path, max_epochs=1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.warns(UserWarning) as warned:
        _, module = start(tmp_path, resume=tmp_path / "step=2.ckpt", max_epochs=1)
    assert any("this restart begins again from there" in str(warning.message) for warning in warned)
    assert len(module.seen) == 4 and "AutoResume: going on" not in info.text


def test_newest_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint([tmp_path, tmp_path / "missing"]) == (None, [])
    old, new, folder, half = (tmp_path / f"{name}.ckpt" for name in ("z", "b", "a", "half"))
    for path in (old, new, half):
        torch.save({"x": torch.zeros(3)}, path)
    with write_beside(folder, directory=True) as partial:
        torch.save({"x": torch.zeros(3)}, partial / "shard.pt")
    (tmp_path / ".c.ckpt.12345678.partial").mkdir()
    (tmp_path / "weights.pt").touch()
    for number, path in enumerate((old, new, folder / "manifest.json", half)):
        os.utime(path, (number, number))
    shorten(half)
    os.utime(half, (9, 9))
    assert newest_checkpoint([tmp_path]) == (folder, [half])
    # what is put beside the shards later, or a shard that is lost
    (folder / "converted").mkdir()
    assert newest_checkpoint([tmp_path]) == (folder, [half])
    shorten(folder / "shard.pt")
    assert newest_checkpoint([tmp_path]) == (new, [half, folder])
    # the second folder has a newer one
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save({}, elsewhere / "c.ckpt")
    assert newest_checkpoint([tmp_path, elsewhere])[0] == elsewhere / "c.ckpt"


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([], {}, "no directory to look in"),
        ([ModelCheckpoint("here", save_weights_only=True)], {}, "no ModelCheckpoint that saves more than weights"),
        ([ModelCheckpoint()], {"logger": CSVLogger("logs")}, "a new one at every start"),
        ([ModelCheckpoint("memory://run")], {}, "looks in local directories"),
    ],
)
def test_refusals(callbacks: list[Callback], options: dict[str, Any], message: str) -> None:
    options = {"logger": False, "enable_checkpointing": bool(callbacks), **options}
    trainer = Trainer(
        accelerator="cpu", callbacks=[AutoResume(), *callbacks], enable_progress_bar=False, max_epochs=1, **options
    )
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(Net(), loader(), loader())


def test_a_directory_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError("not yours")

    monkeypatch.setattr("lightning_accel.durability.auto_resume.newest_checkpoint", refuse)
    with pytest.raises(RuntimeError, match=r"could not look for checkpoints in .*not yours"):
        start(tmp_path)


def test_the_plan_says_what_it_expects() -> None:
    for callback in (AutoResume("somewhere"), ExactResume()):
        assert callback.is_neutral and not callback.is_idle
