"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lightning_accel.hooks import atomic
from lightning_accel.hooks.atomic import (
    MANIFEST,
    CheckpointError,
    PartialCheckpoint,
    find_damage,
    is_complete,
    read_manifest,
    remove_leftovers,
    write_beside,
)
from tests.forking import python


def save_directory(path: Path, value: int = 1) -> Path:
    with write_beside(path, directory=True) as folder:
        (folder / "shard").mkdir()
        torch.save({"value": value}, folder / "shard" / "a.pt")
        torch.save(torch.full((100,), value), folder / "b.pt")
    return path


def hidden(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


def test_a_directory_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.ckpt"
    with write_beside(path, directory=True) as folder:
        (folder / "x").write_bytes(b"123")
        assert not path.exists() and not is_complete(folder)
    assert read_manifest(path) == {"x": {"bytes": 3, "crc32": 0x884863D2}}
    assert is_complete(path) and find_damage(path) == [] and hidden(path.parent) == []


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("old", ["directory", "file"])
@pytest.mark.parametrize("new", ["directory", "file"])
def test_what_was_there_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    path = tmp_path / "last.ckpt"
    for kind, value in ((old, 1), (new, 2)):
        if kind == "directory":
            save_directory(path, value)
        else:
            with write_beside(path) as file:
                torch.save(torch.full((100,), value), file)
    loaded = torch.load(path / "b.pt" if new == "directory" else path, weights_only=True)
    assert (loaded == 2).all() and is_complete(path) and hidden(tmp_path) == []


@pytest.mark.parametrize("directory", [True, False])
def test_an_exception_leaves_what_was_there(tmp_path: Path, directory: bool) -> None:
    path = save_directory(tmp_path / "last.ckpt")
    with pytest.raises(OSError, match="full"), write_beside(path, directory=directory) as partial:
        (partial / "b.pt" if directory else partial).write_bytes(b"1")
        raise OSError("the disk is full")
    assert is_complete(path) and hidden(tmp_path) == []


def test_a_killed_writer_leaves_nothing_that_is_picked_and_the_next_save_cleans_up(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "last.ckpt")
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {os.getcwd()!r})
from lightning_accel.hooks.atomic import write_beside
with write_beside(Path({str(path)!r}), directory=True) as folder:
    (folder / "b.pt").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([python(), "-c", code], check=False).returncode == -signal.SIGKILL
    assert is_complete(path) and len(hidden(tmp_path)) == 1
    leftover = tmp_path / hidden(tmp_path)[0]
    assert not is_complete(leftover)
    save_directory(tmp_path / "other.ckpt")
    assert hidden(tmp_path) == []


def test_a_folder_that_is_about_to_be_locked_stays_for_a_while(tmp_path: Path) -> None:
    unlocked = tmp_path / ".last.ckpt.12345678.unlocked"
    unlocked.mkdir()
    assert remove_leftovers(tmp_path) == []
    age(unlocked)
    assert remove_leftovers(tmp_path) == [unlocked] and not unlocked.exists()


def age(folder: Path) -> None:
    os.utime(folder, (time.time() - 60,) * 2)


def test_what_a_living_writer_is_at_stays(tmp_path: Path) -> None:
    partial = PartialCheckpoint(tmp_path / "a.ckpt")
    age(partial.folder)
    assert remove_leftovers(tmp_path) == [] and partial.folder.is_dir()
    partial.discard()
    assert hidden(tmp_path) == []


def test_damage_is_named(tmp_path: Path) -> None:
    path = save_directory(tmp_path / "a.ckpt")
    content = (path / "b.pt").read_bytes()

    (path / "b.pt").write_bytes(content[:-1])
    assert find_damage(path, read=False) == [
        f"{path / 'b.pt'} has {len(content) - 1} bytes, but {len(content)} were written."
    ]
    assert not is_complete(path)

    (path / "b.pt").write_bytes(content[:-300] + b"!" + content[-299:])
    assert is_complete(path)  # sizes only: quick
    assert find_damage(path) == [f"{path / 'b.pt'} is not what was written: its checksum differs."]
    assert find_damage(path, part=0, parts=2) + find_damage(path, part=1, parts=2) == find_damage(path)

    (path / "b.pt").unlink()
    assert find_damage(path, read=False) == [f"{path / 'b.pt'} is missing."]


def test_checksums_that_are_known_are_not_computed_again(tmp_path: Path) -> None:
    partial = PartialCheckpoint(tmp_path / "a.ckpt")
    (partial.folder / "x").write_bytes(b"1")
    partial.publish({"x": 5})
    assert read_manifest(tmp_path / "a.ckpt") == {"x": {"bytes": 1, "crc32": 5}}


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a": 1}}', '{"files": {"a": {"bytes": 1}}}'])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    path = save_directory(tmp_path / "a.ckpt")
    (path / MANIFEST).write_text(text)
    assert not is_complete(path)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(path)


def test_plain_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file, tensors = tmp_path / "a.ckpt", tmp_path / "a.safetensors"
    torch.save({"state_dict": torch.zeros(1000)}, file)
    save_file({"w": torch.zeros(1000)}, tensors)
    for path in (file, tensors):
        assert is_complete(path)
        path.write_bytes(path.read_bytes()[:-10])
        assert not is_complete(path)
        path.write_bytes(b"")
        assert not is_complete(path)
    assert not is_complete(tmp_path / "absent.ckpt")


def test_directories_of_others(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    deepspeed = tmp_path / "deepspeed"
    (deepspeed / "checkpoint").mkdir(parents=True)
    torch.save({}, deepspeed / "checkpoint" / "mp_rank_00_model_states.pt")
    assert not is_complete(deepspeed)  # `latest` is written last
    (deepspeed / "latest").write_text("checkpoint")
    assert is_complete(deepspeed)
    (deepspeed / "checkpoint" / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    assert not is_complete(deepspeed)
    torch.save({}, deepspeed / "checkpoint" / "mp_rank_00_model_states.pt", _use_new_zipfile_serialization=False)
    assert is_complete(deepspeed)

    torch_distributed = tmp_path / "dcp"
    torch_distributed.mkdir()
    (torch_distributed / ".metadata").write_bytes(b"")
    assert not is_complete(torch_distributed)
    torch.save({}, torch_distributed / "meta.pt")
    assert is_complete(torch_distributed)
