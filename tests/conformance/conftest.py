"""Runs that many tests share, made once, and only those that the selected tests need."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.ranks import launch
from tests.conformance.resume import make_runs

Make = Callable[[Path, list[str], list[str]], None]


def needed(request: pytest.FixtureRequest, fixture: str) -> list[str]:
    """The rows that the selected tests with this fixture ask for, each once."""
    found = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and fixture in item.fixturenames and hasattr(item, "callspec")
    ]
    return list(dict.fromkeys(found))


def made_once(request: pytest.FixtureRequest, factory: pytest.TempPathFactory, fixture: str, make: Make) -> Path:
    """The folder that ``make`` filled, by whichever test process comes first; the others wait for it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all test processes
    folder, done = root / fixture, root / f"{fixture}.done"
    with (root / f"{fixture}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder, needed(request, fixture), request.config.getini("filterwarnings"))
            done.touch()
    return folder


@pytest.fixture(scope="session")
def resume_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every uninterrupted run and every resumed one."""
    return made_once(request, tmp_path_factory, "resume_runs", make_runs)


@pytest.fixture(scope="session")
def rank_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each of two ranks left of every run."""
    return made_once(request, tmp_path_factory, "rank_runs", launch)
