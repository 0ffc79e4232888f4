"""A forked process is what a process of Python itself is, and ends when it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.forking import IMPORTS, python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Linux alone forks")]

DESCRIBE = """
import json, logging, os, signal, sys, warnings
found = {
    "imported": sorted({name.partition(".")[0] for name in sys.modules} & {"tests", "lightning_accel", "deepspeed"}),
    "arguments": sys.argv, "path": sys.path, "directory": os.getcwd(),
    "main": [__name__, __spec__ and __spec__.name, globals().get("__file__"), "found" in vars(sys.modules["__main__"])],
    "signals": [str(signal.getsignal(number)) for number in range(1, 32)],
    "files": sorted(map(int, os.listdir("/proc/self/fd")))[:-1], "hash": hash("a"),
}
"""
IMPORT = f"""
import importlib, random
for name in {IMPORTS}:
    importlib.import_module(name)
import numpy, torch, torchmetrics.utilities.prints
from lightning.pytorch.utilities import rank_zero_only
loggers = [logging.getLogger(name) for name in ("", "lightning.pytorch", "lightning.fabric", "torch.distributed")]
found |= {{
    "environment": dict(os.environ),
    "drawn": [random.random(), numpy.random.rand(), torch.initial_seed()],
    "warnings": [str(rule) for rule in warnings.filters],
    "logging": [[logger.level, str(logger.handlers)] for logger in loggers],
    "ranks": [rank_zero_only.rank, torchmetrics.utilities.prints.rank_zero_only.rank],
    "threads": [torch.get_num_threads(), len(os.listdir("/proc/self/task"))],
}}
"""
PRINT = "print(json.dumps(found))"


def described(program: str, how: list[str]) -> dict[str, Any]:
    new = {"RANK": "3", "LOCAL_RANK": "1", "PYTHONPATH": "folder", "PYTHONHASHSEED": "1", "NEW": "\udc80", "PWD": "?"}
    command = [program, *how, "--a=1"]
    done = subprocess.run(command, env={**os.environ, **new}, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    found.get("environment", {}).pop("PWD", None)  # a shell on the way sets it right
    return found


def test_it_is_as_a_new_process_that_has_imported_the_same() -> None:
    how = ["-c", DESCRIBE + IMPORT + PRINT]
    real, forked, again = (described(program, how) for program in (sys.executable, python(1), python(1)))
    drawn = [found.pop("drawn") for found in (real, forked, again)]
    assert all(len(set(column)) == 3 for column in zip(*drawn, strict=True))
    assert forked == again
    assert {key: (forked[key], real[key]) for key in real if forked[key] != real[key]} == {}
    assert forked["ranks"] == [3, 1] and forked["imported"] == []


@pytest.mark.parametrize("how", [["-m", "describe"], ["folder/script.py"]], ids=["module", "file"])
def test_modules_and_files(how: list[str]) -> None:
    Path("folder").mkdir()
    for name in ("describe.py", "folder/script.py"):
        Path(name).write_text(DESCRIBE + PRINT)
    real, forked = described(sys.executable, how), described(python(1), how)
    assert {key: (forked[key], real[key]) for key in real if forked[key] != real[key]} == {}


def test_what_is_read_at_the_start_makes_it_real() -> None:
    for environment in ({"PYTHONHASHSEED": "6"}, {"OMP_NUM_THREADS": "2"}, {"PYTHONWARNINGS": "ignore"}):
        code = "import sys; print(sys.executable)"
        done = subprocess.run([python(), "-c", code], env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.stdout.strip() == sys.executable
    assert subprocess.run([python(), "-W", "ignore", "-c", code], capture_output=True).stdout == done.stdout.encode()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('said')", 0),
        ("print('said'); raise SystemExit(7)", 7),
        ("print('said', flush=True); 1 / 0", 1),
        ("import os; print('said', flush=True); os._exit(3)", 3),
        ("import os; print('said', flush=True); os.kill(os.getpid(), 9)", -9),
        ("import os; print('said', flush=True); os.abort()", -6),
        ("import atexit; atexit.register(print, 'said')", 0),
        (
            "import sys, subprocess as s; raise SystemExit(s.call([sys.executable, '-c', 'print(\"said\"); exit(5)']))",
            5,
        ),
    ],
)
def test_output_and_status(code: str, status: int) -> None:
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("said\n", status)
    assert ("ZeroDivisionError" in done.stderr) == ("1 / 0" in code)


WAIT = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    process = subprocess.Popen([python(), "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    forked = int(process.stdout.readline())
    assert alive(forked) and process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == -number
    until(lambda: not alive(forked))


def test_all_end_with_the_session(repo: Path) -> None:
    code = f"""
import os, subprocess, sys
from tests import forking
child = subprocess.Popen([forking.python(), "-c", {WAIT!r}], stdout=subprocess.PIPE)
print(int(child.stdout.readline()), forking.FOLDER, flush=True)
os._exit(0)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    forked, folder = done.stdout.split()
    until(lambda: not alive(int(forked)) and not Path(folder).exists())


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
