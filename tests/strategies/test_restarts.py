"""Ranks that are killed, and torchrun that starts them again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.compare import assert_equal
from tests.conformance.processes import made_once
from tests.strategies.launch import free_port, launch, outcome
from tests.strategies.restart_scenarios import STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
MODULE = "tests.strategies.restart_scenarios"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "restarts", lambda folder: launch(MODULE, folder, ["equal to ddp"]))


def test_the_same_numbers_as_ddp(folder: Path) -> None:
    stock, ours = outcome(folder, "equal to ddp")
    assert stock["step"] == STEPS
    assert_equal(ours, stock, "accel_ddp against ddp")


def run_killed(folder: Path, *kills: str) -> tuple[dict[str, Any], str]:
    """What rank 0 has at the end of a run whose ranks are killed, and what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3"]
    command += [f"--master-port={free_port()}", "--monitor-interval=2", "-m", MODULE, str(folder), "accel_ddp"]
    done = subprocess.run([*command, *kills], capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "result.0.pt", weights_only=True), done.stdout + done.stderr


def test_killed_twice(folder: Path, tmp_path: Path) -> None:
    """Rank 1 in a batch, and rank 0 while it writes a checkpoint; each time the first restart goes on."""
    result, printed = run_killed(tmp_path, "0:1:5:batch", "1:0:12:write")
    assert result.pop("restarts") == 2
    assert_equal(result, outcome(folder, "equal to ddp")[0], "killed twice against uninterrupted")
    assert "rank 1 (process" in printed.lower() and "gone" in printed
