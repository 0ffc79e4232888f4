"""Writing that keeps what is there: a file is either the old one or the new one, never half of it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from lightning_accel.report.receipt import Receipt
from lightning_accel.report.record import Run

__all__ = ["StorageError", "read_runs", "write_receipt", "write_run", "write_text"]


class StorageError(OSError):
    """A result could not be written; the sentence says which, why, and what is safe."""


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, through a temporary file beside it that takes its place only when complete.

    Raises:
        StorageError: If it can't be written (a full disk, no permission); an earlier ``path`` is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"Could not write {path}: {error.strerror or error}.") from error


def write_run(folder: Path, run: Run) -> None:
    """Keep one run as ``folder/NAME.json``; raise as :func:`write_text` does."""
    write_text(folder / f"{run.name}.json", json.dumps(run.to_dict(), allow_nan=False) + "\n")


def read_runs(folder: Path) -> list[Run]:
    """Return the runs that :func:`write_run` kept in ``folder``.

    Raises:
        ValueError: If a file there is not the record of a run.
    """
    runs = []
    for path in sorted(folder.glob("*-seed*.json")):
        try:
            runs.append(Run.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise ValueError(f"{path} can't be read: {error} Delete it to run that seed again.") from None
    return runs


def write_receipt(folder: Path, receipt: Receipt) -> dict[str, Path]:
    """Write ``receipt.json``, ``receipt.md`` and ``receipt.html``; return their paths by kind.

    Raises:
        StorageError: If one of them can't be written; the others, and what was there before, are kept.
    """
    from lightning_accel.report.page import render_html
    from lightning_accel.report.text import render_markdown

    texts = {"json": receipt.to_json(), "md": render_markdown(receipt), "html": render_html(receipt)}
    paths = {kind: folder / f"receipt.{kind}" for kind in texts}
    problems = []
    for kind, text in texts.items():
        try:
            write_text(paths[kind], text)
        except StorageError as error:
            problems.append(str(error))
    if problems:
        raise StorageError(" ".join(problems))
    return paths
