"""Runs that many tests share, made once, and only those that the selected tests need."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.ranks import launch
from tests.conformance.resume import make_runs


def needed(request: pytest.FixtureRequest, fixture: str, parameter: str) -> list[str]:
    """The values of ``parameter`` in the tests that were selected and use ``fixture``, each once."""
    found = [
        item.callspec.params[parameter]
        for item in request.session.items
        if isinstance(item, pytest.Function) and fixture in item.fixturenames and hasattr(item, "callspec")
    ]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="session")
def resume_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with every uninterrupted run and every resumed one."""
    folder = tmp_path_factory.mktemp("resume")
    make_runs(folder, needed(request, "resume_runs", "name"), request.config.getini("filterwarnings"))
    return folder


@pytest.fixture(scope="session")
def rank_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each of two ranks left of every run."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, needed(request, "rank_runs", "name"), request.config.getini("filterwarnings"))
    return folder
