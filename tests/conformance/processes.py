"""Starting the processes that a check needs, and waiting for them."""

from __future__ import annotations

import os
import subprocess
import sys


def start(module: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start ``python -m module`` with one torch thread and its output kept."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
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
