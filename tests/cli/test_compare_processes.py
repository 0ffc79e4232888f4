"""`compare` with real runs in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_accel.cli.runner import Job, execute
from lightning_accel.report.receipt import Receipt
from lightning_accel.report.record import Run
from tests.forking import python

PLAIN = """
trainer: {max_epochs: 2, accelerator: cpu, logger: false, enable_checkpointing: false, log_every_n_steps: 1}
model: {class_path: tiny.Tiny, init_args: {fail_seeds: [1]}}
data: {class_path: tiny.TinyData}
"""
ACCELERATED = """
trainer:
  callbacks+:
    - class_path: GradualPruning
      init_args: {amount: 0.5, every: 1step, exclude: []}
"""


@pytest.fixture
def project(own_directory: Path, repo: Path) -> Path:
    (own_directory / "tiny.py").write_text((repo / "tests/cli/tiny.py").read_text())
    (own_directory / "plain.yaml").write_text(PLAIN)
    (own_directory / "accel.yaml").write_text(ACCELERATED)
    return own_directory


def command(*extra: str, program: str = sys.executable) -> list[str]:
    args = ["compare", "--config", "plain.yaml", "--with", "accel.yaml", "--out", "out", *extra]
    return [program, "-m", "lightning_accel", *args]


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.1)


def children_in(folder: Path) -> list[str]:
    """Command lines of the processes that name `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_sides_and_a_crash(project: Path) -> None:
    done = subprocess.run(command("--seeds", "2", program=python()), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: the disk of dreams is full" in done.stdout
    receipt = Receipt.from_json((project / "out/receipt.json").read_text())
    status = {run.name: run.status for run in receipt.runs}
    assert status == {
        "plain-seed0": "finished",
        "accelerated-seed0": "finished",
        "accelerated-seed1": "failed",
        "plain-seed1": "failed",
    }
    plain, accelerated = receipt.finished("plain")[0], receipt.finished("accelerated")[0]
    assert receipt.metric == "val_acc"
    assert [point.step for point in plain.history["val_acc"]] == [4, 8]
    assert (plain.nonzeros, accelerated.nonzeros) == (15, 9)  # half of the 12 weights; biases are not pruned
    assert plain.seconds_process > plain.seconds_fit > 0
    assert plain.data == "64 made-up points"
    assert set(plain.sources) >= {"tiny.py"}
    assert plain.environment["processor"]
    assert {path.name for path in (project / "out").glob("receipt.*")} == {"receipt.json", "receipt.md", "receipt.html"}
    assert "GradualPruning" in (project / "out/runs/accelerated-seed0.log").read_text()
    assert not (project / "lightning_logs").exists() and not (project / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_stops_the_run_and_keeps_the_rest(project: Path) -> None:
    long = PLAIN.replace("fail_seeds: [1]", "wait: 0.05")
    (project / "plain.yaml").write_text(long)
    (project / "accel.yaml").write_text(ACCELERATED + "model: {init_args: {wait: 3}}\n")
    environment = {**os.environ, "TMPDIR": str(project)}
    process = subprocess.Popen(
        command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    )
    wait_for(project / "out/runs/plain-seed0.json", process)
    wait_for(project / "out/runs/accelerated-seed0.log", process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "The runs that are done are kept." in output and "Time to finish the fit" in output
    receipt = Receipt.from_json((project / "out/receipt.json").read_text())
    assert [run.name for run in receipt.runs] == ["plain-seed0"]
    assert children_in(project) == []
    assert list(project.glob("lightning-accel-*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_while_a_process_starts_leaves_none_behind(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def interrupted(*args: Any, **options: Any) -> Any:
        process = start(*args, **options)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    monkeypatch.setattr(tempfile, "tempdir", str(project))
    with pytest.raises(KeyboardInterrupt):
        execute(Job("plain", 0, ["fit", "--config", "plain.yaml"], project), lambda fraction: None)
    assert children_in(project) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_bad_configuration_shows_what_lightning_says(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python())
    (project / "plain.yaml").write_text(PLAIN.replace("max_epochs", "max_epoch"))
    job = Job("plain", 0, ["fit", "--config", "plain.yaml"], project)
    run = execute(job, lambda fraction: None)
    assert (run.status, run.seed) == ("failed", 0)
    assert "max_epoch" in run.error and "exit status 2" in run.error
    assert str(project / "plain-seed0.log") in run.error


def test_killed_process(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killer = project / "killer"
    killer.write_text("#!/bin/sh\necho before the end\nkill -9 $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    run = execute(Job("accelerated", 3, ["fit"], project), lambda fraction: None)
    assert run.status == "failed"
    assert run.error.startswith("before the end\n(killed by signal 9")


def test_result_and_progress_are_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Run("plain", 0, "finished", seconds_fit=1.0)
    script = project / "script"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys, time\njob = json.load(open(sys.argv[3]))\n"
        "open(job['progress'], 'w').write('0.25')\ntime.sleep(0.4)\n"
        f"open(job['result'], 'w').write({made.to_dict()!r} and json.dumps({made.to_dict()!r}))\n"
        "print(job['args'], job['root'])\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    told: list[float] = []
    run = execute(Job("plain", 0, ["fit", "--x"], project), told.append)
    assert run.seconds_fit == 1.0 and run.seconds_process >= 0.4
    assert 0.25 in told
    log = (project / "plain-seed0.log").read_text()
    assert log == f"['fit', '--x', '--seed_everything=0'] {project / 'plain-seed0'}\n"
