from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lightning_accel.report.receipt import Receipt, make_receipt
from lightning_accel.report.store import StorageError, read_runs, write_receipt, write_run, write_text
from tests.report.synthetic import make_run


def fill_disk(monkeypatch: pytest.MonkeyPatch, match: str = "") -> None:
    """Let every fsync of a file whose path holds `match` fail as on a full disk."""
    real = os.fsync

    def fsync(number: int) -> None:
        if match in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)


def test_runs_come_back(tmp_path: Path) -> None:
    runs = [make_run("accelerated", 0), make_run("plain", 0), make_run("plain", 11)]
    for run in runs:
        write_run(tmp_path / "new" / "folder", run)
    assert read_runs(tmp_path / "new" / "folder") == runs
    assert read_runs(tmp_path / "nothing") == []


def test_full_disk_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    assert os.listdir(tmp_path) == ["a.txt"]
    fill_disk(monkeypatch)
    with pytest.raises(StorageError, match=r"Could not write .*a\.txt: No space left on device\."):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]  # no half-written file is left


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_really_full(tmp_path: Path) -> None:
    target = tmp_path / f".a.txt.{os.getpid()}.tmp"
    target.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        write_text(tmp_path / "a.txt", "new")
    assert not (tmp_path / "a.txt").exists()


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Could not write"):
        write_text(tmp_path / "file" / "a.txt", "new")


def test_one_file_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = make_receipt([make_run("plain", 0), make_run("accelerated", 0)])
    fill_disk(monkeypatch, ".html")
    with pytest.raises(StorageError, match=r"receipt\.html: No space"):
        write_receipt(tmp_path, receipt)
    assert Receipt.from_json((tmp_path / "receipt.json").read_text()) == receipt
    assert (tmp_path / "receipt.md").read_text().startswith("# Receipt")
    assert not (tmp_path / "receipt.html").exists()


def test_unreadable_run(tmp_path: Path) -> None:
    (tmp_path / "plain-seed0.json").write_text('{"side": "pl')
    with pytest.raises(ValueError, match=r"plain-seed0\.json can't be read.*Delete it to run that seed again"):
        read_runs(tmp_path)
