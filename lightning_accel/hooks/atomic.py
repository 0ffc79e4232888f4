"""Checkpoints that are whole or not there: written beside their place, then moved into it in one step.

While it is written, the checkpoint ``last.ckpt`` lies in the hidden folder ``.last.ckpt.XXXXXXXX.partial`` beside it,
which its writer holds a lock on. A writer that was killed leaves the folder behind without the lock; the next save to
the same parent removes it. So it is with one that is being removed. A finished directory has a manifest, which names
each file with its size and checksum, so that a file that was truncated, changed or lost later is seen.

The checksum (CRC-32) finds damage, not malice: who can change a file can change the manifest too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "MANIFEST",
    "MARK",
    "CheckpointError",
    "PartialCheckpoint",
    "check_manifest",
    "checksum",
    "damage_error",
    "find_damage",
    "is_complete",
    "read_manifest",
    "remove_checkpoint",
    "remove_leftovers",
    "write_beside",
]

MANIFEST = "manifest.json"
MARK = "lightning_accel_manifest"
"""A key in what was saved into a directory, which says that the directory was given a manifest."""
_YOUNG = 10.0  # seconds after which a folder that is still to be locked was left by a killed writer
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read or written; the message names the file and says what to do."""


class PartialCheckpoint:
    """A checkpoint on its way to ``path``: write into :attr:`folder`, then :meth:`publish` or :meth:`discard` it.

    On several ranks one of them makes it and all write into its folder.

    Args:
        path: Where the checkpoint goes. What is there now stays until the new one is whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        self.folder = _hidden(path)
        unlocked = self.folder.with_suffix(".unlocked")
        unlocked.mkdir()
        self._lock = _lock(unlocked)
        unlocked.rename(self.folder)  # so that one without a lock is a killed writer's

    def publish(self, checksums: dict[str, int] | None = None) -> None:
        """Write the manifest and move the folder to :attr:`path`, in the place of what is there.

        Args:
            checksums: CRC-32 by path in the folder, where they are known already; the others are computed.
        """
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        names = {file: file.relative_to(self.folder).as_posix() for file in files}
        known = checksums or {}
        entries = {
            name: {"bytes": file.stat().st_size, "crc32": known[name] if name in known else checksum(file)}
            for file, name in names.items()
        }
        (self.folder / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}, indent=1))
        for file in [*files, self.folder / MANIFEST]:
            _flush(file)
        self._move(self.folder)

    def publish_file(self, file: Path) -> None:
        """Move one file out of the folder to :attr:`path`, in the place of what is there."""
        _flush(file)
        self._move(file)

    def discard(self) -> None:
        """Remove what was written; :attr:`path` stays as it is."""
        with contextlib.suppress(OSError):
            _remove(self.folder)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _move(self, source: Path) -> None:
        if source.is_dir() or self.path.is_dir():
            # A directory that has files can't be renamed over. Where the two can change places, no moment is without
            # a checkpoint at `path`.
            if os.path.lexists(self.path) and not _exchange(source, self.path):
                old = _hidden(self.path)
                os.rename(self.path, old)
                os.rename(source, self.path)
                with contextlib.suppress(FileNotFoundError):  # another writer to the folder removes it too
                    _remove(old)
            elif not os.path.lexists(self.path):
                os.rename(source, self.path)
        else:
            os.replace(source, self.path)
        _flush(self.path.parent)
        self.discard()


@contextlib.contextmanager
def write_beside(path: Path, *, directory: bool = False) -> Iterator[Path]:
    """Give a place beside ``path`` to write to; it becomes ``path`` when the block ends, or is removed by an exception.

    Args:
        path: Where the checkpoint goes.
        directory: Whether it is a directory (made here, and given a manifest) or one file (made in the block).

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "weights.ckpt"
        >>> with write_beside(path) as partial:
        ...     torch.save({"w": torch.zeros(2)}, partial)
        >>> is_complete(path)
        True
    """
    partial = PartialCheckpoint(path)
    try:
        yield partial.folder if directory else partial.folder / path.name
        if directory:
            partial.publish()
        else:
            partial.publish_file(partial.folder / path.name)
    except BaseException:
        partial.discard()
        raise


def is_complete(path: Path) -> bool:
    """Whether there is a whole checkpoint at ``path``, told without reading all of it.

    A directory with a manifest must have each file in its full size. One without (of plain DeepSpeed, or of Lightning's
    ModelParallelStrategy) must have the file that is written last, and no file that ends too early. A file must be a
    zip archive with its directory at the end, as ``torch.save`` writes it, or a whole safetensors file.
    """
    if path.name.startswith(".") and path.name.endswith(".partial"):
        return False
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return not find_damage(path, read=False)
        if (path / "latest").is_file():
            files = list((path / (path / "latest").read_text().strip()).glob("*.pt"))
            return bool(files) and all(_ends_well(file) or _is_old_format(file) for file in files)
        return all((path / name).is_file() for name in (".metadata", "meta.pt")) and _ends_well(path / "meta.pt")
    return path.is_file() and _ends_well(path)


def read_manifest(path: Path) -> dict[str, dict[str, int]] | None:
    """Return the size and the CRC-32 of each file of a checkpoint directory, or ``None`` where it has no manifest.

    Raises:
        CheckpointError: If the manifest is not one.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        return None
    try:
        loaded: Any = json.loads(manifest.read_text())
        return {str(name): {"bytes": int(e["bytes"]), "crc32": int(e["crc32"])} for name, e in loaded["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest} is damaged ({error}).") from error


def find_damage(path: Path, *, read: bool = True, part: int = 0, parts: int = 1) -> list[str]:
    """Compare a directory with its manifest; return what is wrong, a sentence for each file.

    Args:
        path: The directory. Without a manifest nothing can be said, and nothing is.
        read: Whether to read the files and compare checksums too, or only their sizes.
        part: Which part of the files to look at, so that several ranks share the work.
        parts: How many parts there are.
    """
    try:
        entries = sorted((read_manifest(path) or {}).items())
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, entry in entries[part::parts]:
        file = path / name
        if not file.is_file():
            found.append(f"{file} is missing.")
        elif (size := file.stat().st_size) != entry["bytes"]:
            found.append(f"{file} has {size} bytes, but {entry['bytes']} were written.")
        elif read and checksum(file) != entry["crc32"]:
            found.append(f"{file} is not what was written: its checksum differs.")
    return found


def damage_error(path: Path, found: Iterable[str]) -> CheckpointError:
    """The error of a damaged checkpoint: what :func:`find_damage` found, each once, and what to do."""
    return CheckpointError(
        f"{path} is damaged. {' '.join(dict.fromkeys(found))} Copy it again from where it is whole, or use another "
        "checkpoint."
    )


def check_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a directory that has lost its manifest, so that nobody knows whether its files are whole.

    Args:
        path: The directory.
        content: What was saved into it, with :data:`MARK` if there was a manifest.

    Raises:
        CheckpointError: If it is gone.
    """
    if content.get(MARK) and not (path / MANIFEST).is_file():
        raise damage_error(path, [f"{path / MANIFEST} is missing, by which the other files are checked."])


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file's content."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, a directory or a file; one that is killed meanwhile leaves no half of it at ``path``."""
    if path.is_dir() and not path.is_symlink():
        hidden = _hidden(path)
        os.rename(path, hidden)
        with contextlib.suppress(FileNotFoundError):  # another writer to the folder removes it too
            _remove(hidden)
    else:
        _remove(path)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed writers left in ``folder``, and return it; what a living one holds the lock of stays."""
    removed = []
    for leftover in [*folder.glob(".*.partial"), *folder.glob(".*.unlocked")]:
        with contextlib.suppress(OSError):
            if leftover.suffix == ".unlocked" and time.time() - leftover.stat().st_mtime < _YOUNG:
                continue
            if (lock := _lock(leftover)) is None:
                continue
            _remove(leftover)
            os.close(lock)
            removed.append(leftover)
    return removed


def _hidden(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"


def _lock(folder: Path) -> int | None:
    """Lock a directory for as long as this process lives; ``None`` where another one has it, or locks don't exist."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, where the system can (Linux)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush(path: Path) -> None:
    """Have the system write a file or a directory to the disk, so that a machine that goes down keeps it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # not every file system can
            raise
    finally:
        os.close(descriptor)


def _is_old_format(file: Path) -> bool:
    """Whether a file has torch's format before zip archives, which plain DeepSpeed writes; its end tells nothing."""
    with file.open("rb") as stream:
        return stream.read(15) == b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def _ends_well(file: Path) -> bool:
    """Whether a file is whole: a zip has its directory at the end, a safetensors header tells the size."""
    try:
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return file.stat().st_size == 8 + length + max(ends, default=0)
        with zipfile.ZipFile(file) as archive:
            return bool(archive.namelist())
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return False
