"""What every test starts from: one torch thread, fixed seeds, and an empty working directory of its own."""

from __future__ import annotations

import inspect
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# Before torch is imported, and inherited by every process that a test starts. More threads than cores make tiny models
# many times slower. PYTHONPATH lets a child process import `tests`, from whatever directory it runs in.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
os.environ["MPLBACKEND"] = "Agg"
# What `seed_everything` leaves behind: samplers and workers of later tests would be seeded by it.
SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
# What a launcher, or a strategy in its place, leaves behind: whatever is started later would believe to be of its run.
RANKS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
for name in SEEDS:
    os.environ.pop(name, None)
# A shell lets what it starts in the background ignore Ctrl-C, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["COLUMNS"] = "140"  # how wide tables are printed, whatever terminal this is

import hypothesis
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

torch.set_num_threads(1)

# How a test resumes with ``torch.load(weights_only=True)``: ``trainer.fit(..., **WEIGHTS_ONLY)``. Lightning 2.5 can't.
WEIGHTS_ONLY = {"weights_only": True} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}

# Derandomized: the same examples in every run, so that a red test is red again. No deadline: the machine may be busy.
hypothesis.settings.register_profile("repo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repo")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several test processes, start with what takes long, so that they end together, and keep groups together."""
    if not config.getoption("loadgroup", False):
        return

    def length(item: pytest.Item) -> tuple[float, bool]:
        limit = item.get_closest_marker("timeout")
        return limit.args[0] if limit else float(config.getini("timeout")), "slow" in item.keywords

    items.sort(key=length, reverse=True)
    for item in items:
        for mark in item.iter_markers("xdist_group"):  # xdist 3.8 sets an attribute that pytest 9.2 no longer has
            item._id = type(item.id).parse(f"{item.nodeid}@{mark.args[0]}")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random states."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Take away what `seed_everything` and strategies leave in the process: seeds, ranks, a process group."""
    yield
    for name in (*SEEDS, *RANKS):
        os.environ.pop(name, None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every test in an empty directory of its own, so that logs and checkpoints never land in the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO
