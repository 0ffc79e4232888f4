"""AutoResume: which checkpoint is chosen, that a run started again ends as the uninterrupted one, and its refusals."""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
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
from lightning_accel.durability.checkpoint_head import why_not_resumable
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
    assert "no checkpoint to go on from" in info.text and "begins anew" in info.text
    folder = tmp_path / "killed"
    for step in (7, 12):  # in mid-epoch, and where an epoch begins
        with pytest.raises(Killed):
            start(folder, KillAt(step))
    shorten(folder / "step=12.ckpt")  # as if the kill had come while it was written
    info.clear()
    trainer, module = start(folder)
    (line,) = [line for line in info.messages if line.startswith("AutoResume")]
    assert line.startswith(f"AutoResume: going on from {folder / 'step=10.ckpt'}, written ")
    assert line.endswith("s ago (passed over: step=12.ckpt, which is not complete).")
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


LIGHTNING = {"pytorch-lightning_version": "2.6.6", "lr_schedulers": [], "state_dict": {"x": torch.zeros(3)}}


def save(path: Path, step: int = 0, at: int | None = None, **more: Any) -> Path:
    """A checkpoint with what makes it one."""
    torch.save({**LIGHTNING, "global_step": step, **more}, path)
    if at is not None:
        os.utime(path, (at, at))
    return path


def test_newest_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint([tmp_path, tmp_path / "missing"]) == (None, {})
    old, new = save(tmp_path / "z.ckpt", at=0), save(tmp_path / "b.ckpt", at=1)
    folder, half = tmp_path / "a.ckpt", save(tmp_path / "half.ckpt")
    with write_beside(folder, directory=True) as partial:
        save(partial / "meta.pt")
    os.utime(folder / "manifest.json", (2, 2))
    (tmp_path / ".c.ckpt.12345678.partial").mkdir()
    (tmp_path / "weights.pt").touch()
    shorten(half)
    os.utime(half, (9, 9))
    assert newest_checkpoint([tmp_path]) == (folder, {half: "is not complete"})
    # what is put beside the shards later, or a shard that is lost
    (folder / "converted").mkdir()
    assert newest_checkpoint([tmp_path])[0] == folder
    shorten(folder / "meta.pt")
    assert newest_checkpoint([tmp_path]) == (new, dict.fromkeys((half, folder), "is not complete"))
    assert old.exists()
    # the second folder has a newer one
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert newest_checkpoint([tmp_path, elsewhere, save(elsewhere / "c.ckpt").parent])[0] == elsewhere / "c.ckpt"


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty", "ignore:Be aware that when using")
def test_what_no_fit_can_go_on_from_is_passed_over(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    """Only weights, as `save_weights_only` writes them; and files of others, of which nothing is run."""
    start(tmp_path, ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True), max_epochs=1)
    (good, _, _, weights) = sorted(tmp_path.glob("*.ckpt"), key=lambda path: (path.name == "weights.ckpt", path.name))
    os.utime(good, (2e9, 2e9))
    os.utime(weights, (3e9, 3e9))
    ours = {path: "is not a checkpoint of Lightning" for path in (tmp_path / "other.ckpt", tmp_path / "text.ckpt")}
    torch.save({"model": Harmful(tmp_path / "harm"), "global_step": 9}, tmp_path / "other.ckpt")
    with zipfile.ZipFile(tmp_path / "text.ckpt", "w") as archive:
        archive.writestr("a.txt", "hello")
    old = tmp_path / "old format.ckpt"
    torch.save({**LIGHTNING, "hyper_parameters": Harmful(tmp_path / "harm")}, old, _use_new_zipfile_serialization=False)
    for path in ours:
        os.utime(path, (4e9, 4e9))
    skipped = {**ours, weights: "has only weights"}
    assert newest_checkpoint([tmp_path]) == (good, skipped)
    assert why_not_resumable(old) == ("", -1)
    assert not (tmp_path / "harm").exists()
    info.clear()
    start(tmp_path, max_epochs=1)
    reasons = "; ".join(
        f"{path.name}, which {reason}" for path, reason in {**ours, weights: "has only weights"}.items()
    )
    assert f"{good}, written 0 s ago (passed over: {reasons})." in info.text


def test_of_the_same_moment_the_highest_step(tmp_path: Path) -> None:
    for name, step in (("b", 9), ("c", 10), ("d", 2)):
        save(tmp_path / f"{name}.ckpt", step, at=5)
    save(tmp_path / "e.ckpt", 99, at=4)
    assert newest_checkpoint([tmp_path])[0] == tmp_path / "c.ckpt"


class KillBeforeRemoving(Callback):
    """Stands for a kill after a checkpoint is there, and before the one that it replaces is removed."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        def refuse(path: Any) -> None:
            raise Killed

        trainer.strategy.remove_checkpoint = refuse  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"save_top_k": 1}, {"step=18.ckpt"}),
        ({"save_top_k": 2, "monitor": "step", "mode": "max"}, {"step=16.ckpt", "step=18.ckpt"}),
        ({"save_top_k": -1}, {f"step={step}.ckpt" for step in range(2, 19, 2)}),
    ],
)
def test_kills_leave_no_checkpoints_behind(tmp_path: Path, options: dict[str, Any], left: set[str]) -> None:
    def again(*more: Callback) -> None:
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}", **options)
        fit([AutoResume(), ExactResume(), saving, *more], loader, enable_checkpointing=True)

    mine = tmp_path / "of last year.ckpt"
    torch.save({"state_dict": {}}, mine)
    for _ in range(3):
        with pytest.raises(Killed) if options["save_top_k"] > 0 else contextlib.nullcontext():
            again(KillBeforeRemoving())
    again()
    assert {path.name for path in tmp_path.glob("step=*")} == left
    assert mine.exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_what_the_fit_was_given_is_never_removed(tmp_path: Path) -> None:
    def run(*more: Callback, **options: Any) -> None:
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}")
        fit([AutoResume(), ExactResume(), saving, *more], loader, enable_checkpointing=True, **options)

    for step, options in {5: {}, 7: {"resume": tmp_path / "step=4.ckpt"}}.items():
        with pytest.raises(Killed):
            run(KillAt(step), **options)
    run()
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=18.ckpt", "step=4.ckpt"}


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
