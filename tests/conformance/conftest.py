"""Runs that many tests share, made once, and only those that the selected tests need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance import ranks, resume
from tests.conformance.processes import made_once
from tests.conformance.strategies import run_all

Make = Callable[[Path, list[str], list[str]], None]


def needed(request: pytest.FixtureRequest, fixture: str) -> list[str]:
    """The rows that the selected tests with this fixture ask for, each once."""
    found = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and fixture in item.fixturenames and hasattr(item, "callspec")
    ]
    return list(dict.fromkeys(found))


def made(request: pytest.FixtureRequest, factory: pytest.TempPathFactory, fixture: str, make: Make) -> Path:
    """The folder with what ``make`` made of the rows that are needed."""
    filters = request.config.getini("filterwarnings")
    return made_once(factory, fixture, lambda folder: make(folder, needed(request, fixture), filters))


@pytest.fixture(scope="session")
def resume_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every uninterrupted run and every resumed one."""
    return made(request, tmp_path_factory, "resume_runs", resume.make_runs)


@pytest.fixture(scope="session")
def rank_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each of two ranks left of every run."""
    return made(request, tmp_path_factory, "rank_runs", ranks.make_runs)


@pytest.fixture(scope="session")
def strategy_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each of two ranks left of every run under a strategy."""
    return made(request, tmp_path_factory, "strategy_runs", lambda folder, names, _: run_all(folder, names))
