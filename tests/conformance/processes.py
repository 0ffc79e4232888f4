"""Starting the processes that a check needs, and waiting for them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def start(module: str, *arguments: str, program: str = sys.executable, **environment: str) -> subprocess.Popen[str]:
    """Start ``python -m module`` with one torch thread and its output kept."""
    return subprocess.Popen(
        [program, "-m", module, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(processes: list[subprocess.Popen[str]], seconds: float = 400) -> None:
    """Wait for all; when one fails, end the others (they may be waiting for it) and say what it printed."""
    try:
        for process in processes:
            output, _ = process.communicate(timeout=seconds)
            assert process.returncode == 0, f"{process.args} failed with {process.returncode}:\n{output[-6000:]}"
    finally:
        for process in processes:
            process.kill()


def made_once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """The folder that ``fill`` filled, by whichever test process comes first; the others wait for it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all test processes
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir(exist_ok=True)
            fill(folder)
            done.touch()
    return folder
