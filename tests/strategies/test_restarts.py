"""Ranks that are killed, and torchrun that starts them again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.compare import assert_equal
from tests.conformance.processes import made_once
from tests.strategies.launch import free_port
from tests.strategies.restart_scenarios import STEPS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("restarts"), pytest.mark.timeout(400)]
# In a batch; when the checkpoint is whole but not in its place; and, where each rank writes a part, while rank 1 does.
KILLS = ["accel_ddp:0:1:5:batch", "accel_ddp:1:0:12:move", "fsdp2:2:1:8:shard", "zero2:3:1:10:shard"]
PAIRS = {"accel_ddp": "ddp", "fsdp2": "whole fsdp2", "zero2": "whole zero2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All in one run of torchrun, since what takes time is to start processes."""

    def fill(folder: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={len(KILLS)}"]
        command += [f"--master-port={free_port()}", "--monitor-interval=1"]
        command += ["-m", "tests.strategies.restart_scenarios", str(folder), ",".join([*PAIRS, *PAIRS.values()])]
        done = subprocess.run([*command, *KILLS], capture_output=True, text=True, timeout=390, check=False)
        (folder / "printed").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stderr[-6000:]

    return made_once(tmp_path_factory, "restarts", fill)


def result(folder: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize("name", PAIRS)
def test_killed_it_ends_as_the_uninterrupted_run(folder: Path, name: str) -> None:
    killed, whole = result(folder, name), result(folder, PAIRS[name])
    assert killed["step"] == STEPS
    # each came back at the first restart
    assert killed.pop("restarts") == max(int(kill.split(":")[1]) for kill in KILLS if kill.startswith(name)) + 1
    assert whole.pop("restarts") == len(KILLS)
    assert_equal(killed, whole, f"{name} killed against {PAIRS[name]}")
    assert killed["left"] == [f"step={step}.ckpt" for step in (STEPS - 2, STEPS)]


def test_the_survivors_say_which_rank_is_gone(folder: Path) -> None:
    printed = (folder / "printed").read_text().lower()
    gone = re.findall(r"rank (\d) \(process \d+ on \S+\) is gone: killed or crashed", printed)
    assert set(gone) == {"0", "1"}
    for number in range(len(KILLS)):
        assert f"torchrun now starts all ranks again (restart {number + 1} of {len(KILLS)})" in printed
