"""A training process that is killed with SIGKILL in mid-epoch, and the process that goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.durability.runs import differences

TRAIN = """
import sys, time
from pathlib import Path
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_accel import ExactResume
from tests.durability.runs import fit, loader, outcome

class Slow(Callback):
    def on_train_batch_start(self, *_):
        time.sleep(0.05)

folder, slow, resume = Path(sys.argv[1]), sys.argv[2] == "slow", sys.argv[3:]
checkpoint = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
trainer, module = fit(
    [ExactResume(), checkpoint, *([Slow()] if slow else [])],
    lambda: loader(2),
    accumulate_grad_batches=2,
    max_epochs=8,
    enable_checkpointing=True,
    resume=Path(resume[0]) if resume else None,
)
torch.save(outcome(trainer, module), folder / "outcome.pt")
"""


def train(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", TRAIN, str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def newest(folder: Path) -> Path | None:
    return max(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]), default=None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_in_mid_epoch(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "fast")
    victim = train(tmp_path / "killed", "slow")
    step = random.SystemRandom().randrange(4, 20)  # of 24, three an epoch
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / f"step={step}.ckpt").exists():
        assert time.monotonic() < deadline and victim.poll() is None
        time.sleep(0.01)
    os.killpg(victim.pid, signal.SIGKILL)  # its workers too
    assert victim.wait() == -signal.SIGKILL
    last = newest(tmp_path / "killed")
    while last is not None and not readable(last):  # it may have been killed while it wrote
        last.unlink()
        last = newest(tmp_path / "killed")
    assert last is not None and not (tmp_path / "killed" / "outcome.pt").exists()
    assert train(tmp_path / "resumed", "fast", str(last)).wait(300) == 0
    assert whole.wait(300) == 0
    expected = torch.load(tmp_path / "whole" / "outcome.pt")
    found = torch.load(tmp_path / "resumed" / "outcome.pt")
    assert expected["step"] == 24
    assert differences(expected, found) == [], f"killed at step {step}, resumed from {last.name}"


def readable(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True
