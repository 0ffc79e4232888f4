"""What a checkpoint says of itself, read without loading it: no tensor is read, and no class of the file is made.

A pickle names the classes that it wants built. Here every name gives an empty stand-in, so that looking into a file
that came from anywhere runs none of its code.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

__all__ = ["read_head", "why_not_resumable"]

_OLD_FORMAT_PICKLES = 4  # a magic number, the format's version, the system's sizes, what was saved


class _StandIn:
    """Takes whatever a pickle does to an object, and keeps none of it."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _StandIn:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    extend = add = append


class _Skimmer(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        return _StandIn

    def persistent_load(self, pid: Any) -> Any:
        return None  # where a tensor's numbers would be read


def read_head(path: Path) -> dict[str, Any]:
    """Return the plain values of a checkpoint: numbers, strings, and dicts and lists of them.

    Args:
        path: A file of ``torch.save``, or a directory of FullyShardStrategy, ZeROStrategy, or Lightning's own.

    Raises:
        ValueError: If there is none to read.
    """
    file: Path | None = path
    if path.is_dir():
        files = [path / "meta.pt", *sorted(path.glob("*/*model_states.pt"))]
        file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{path} is a directory without a checkpoint")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(name) as stream:
                    head = _Skimmer(stream).load()
        else:
            with file.open("rb") as stream:
                for _ in range(_OLD_FORMAT_PICKLES):
                    head = _Skimmer(stream).load()
    except Exception as error:  # a pickle that is none can raise anything
        raise ValueError(f"{file} is not a file of torch.save ({type(error).__name__})") from error
    if not isinstance(head, dict):
        raise ValueError(f"{file} has no dict")
    return head


def why_not_resumable(path: Path) -> tuple[str, int]:
    """Say why a fit can't go on from a whole checkpoint, and at which step it was saved.

    Returns:
        The reason (empty where a fit can), and the ``global_step`` (-1 where it has none).
    """
    try:
        head = read_head(path)
    except (OSError, ValueError):
        return "is not a checkpoint of Lightning", -1
    if "pytorch-lightning_version" not in head:
        return "is not a checkpoint of Lightning", -1
    step = head.get("global_step")
    # Lightning leaves this out with `save_weights_only`, under every strategy
    reason = "" if "lr_schedulers" in head else "has only weights"
    return reason, step if isinstance(step, int) else -1
