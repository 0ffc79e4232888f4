"""Starts one run of a comparison in a process of its own, watches it and reads what it measured."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_accel.report.record import Run, Side
from lightning_accel.report.store import StorageError

__all__ = ["Job", "execute", "log_tail", "warm_up"]

_POLL = 0.1
_PATIENCE = 5.0  # seconds between asking a process to stop and killing it


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        side: "plain" or "accelerated".
        seed: What ``seed_everything`` is set to.
        args: LightningCLI's command line, without the seed.
        folder: Where the run's log, and what its Trainer writes by default, goes.
    """

    side: Side
    seed: int
    args: list[str]
    folder: Path

    @property
    def log(self) -> Path:
        """The file of the run's output."""
        return self.folder / f"{self.side}-seed{self.seed}.log"


def execute(job: Job, on_progress: Callable[[float], None]) -> Run:
    """Run ``job`` to its end.

    Args:
        job: What to run.
        on_progress: Called with the fraction of the run that is done.

    Returns:
        The run, finished or failed; a failed one carries the end of its log.

    Raises:
        KeyboardInterrupt: Passed on after the process and all it started have been stopped.
        StorageError: If the log can't be written.
    """
    with tempfile.TemporaryDirectory(prefix="lightning-accel-") as folder:
        files = {name: Path(folder) / name for name in ("progress", "result", "job.json")}
        root = job.folder / f"{job.side}-seed{job.seed}"
        description = {
            "side": job.side,
            "seed": job.seed,
            "args": [*job.args, f"--seed_everything={job.seed}"],
            "root": str(root),
            "progress": str(files["progress"]),
            "result": str(files["result"]),
        }
        files["job.json"].write_text(json.dumps(description), encoding="utf-8")
        try:
            log = open(job.log, "wb")  # noqa: SIM115  # closed by the `with` below; opened here to tell its own errors
        except OSError as error:
            raise StorageError(f"Could not write {job.log}: {error.strerror or error}.") from error
        with log:
            began = time.perf_counter()
            command = [sys.executable, "-m", "lightning_accel.cli.run_one", str(files["job.json"])]
            environment = {"COLUMNS": "120", **os.environ}
            with _running(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process:
                while (status := process.poll()) is None:
                    time.sleep(_POLL)
                    with contextlib.suppress(OSError, ValueError):
                        on_progress(float(files["progress"].read_text()))
            seconds = time.perf_counter() - began
        if status == 0 and files["result"].exists():
            run = Run.from_dict(json.loads(files["result"].read_text(encoding="utf-8")))
            return replace(run, seconds_process=seconds)
    reason = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return Run(job.side, job.seed, "failed", error=f"{log_tail(job.log)}\n({reason}; the whole log is {job.log})")


def warm_up() -> None:
    """Import once what every run imports, so that the first run does not pay alone for reading it from the disk."""
    command = [sys.executable, "-c", "import lightning_accel.cli.run_one"]
    with _running(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        process.wait()


@contextlib.contextmanager
def _running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own: Ctrl-C reaches this one alone, which then stops the other and its children."""
    process = None
    try:
        with _interrupts_held():
            process = subprocess.Popen(command, start_new_session=True, **options)
        yield process
    finally:
        if process is not None:
            _stop(process)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C, and what is treated like it, back while a process starts: it would be left behind."""
    held: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and callable(signal.getsignal(number)):  # neither ignored nor left to the system
                before[number] = signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            raise KeyboardInterrupt


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the process and all it started: ask by SIGINT, as Ctrl-C does, and kill what is left after a while."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def log_tail(path: Path, lines: int = 30) -> str:
    """Return the last lines of a log, without colours and without what a progress bar wrote over."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    shown = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join([line for line in shown if line][-lines:])
