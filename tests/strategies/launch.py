"""Scenarios on several ranks on the CPU: one launch of processes runs many, and keeps what each rank returned.

A module of scenarios ends with ``if __name__ == "__main__": serve({"name": function, ...})``; a test calls
``launch("tests.strategies.that_module", folder, ["name", ...], ranks=2)`` once (in a fixture shared by its tests), then
``outcome(folder, "name", rank)``. A function gets the folder and returns tensors, numbers, strings, or lists of them.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.conformance.processes import start, wait
from tests.forking import python

__all__ = ["free_port", "launch", "outcome", "serve"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(
    module: str, folder: Path, names: list[str], ranks: int = 2, seconds: float = 400, **environment: str
) -> None:
    """Run the scenarios, one after another, in one set of processes, where even and odd ranks hash otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    processes = []
    for rank in range(ranks):
        seed = 1 + rank % 2
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONHASHSEED": str(seed), **common}
        processes.append(start(module, str(folder), *names, program=python(seed), **own))
    wait(processes, seconds)


def outcome(folder: Path, name: str, rank: int = 0) -> Any:
    """What the scenario returned on that rank; its traceback fails the test."""
    error = folder / f"{name}.{rank}.error"
    assert not error.exists(), error.read_text()
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=True)


def serve(scenarios: Mapping[str, Callable[[Path], Any]]) -> None:
    """The main of a module of scenarios."""
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    warnings.simplefilter("ignore")  # here, and not where scenarios are defined: tests import those
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        try:
            torch.save(scenarios[name](folder), folder / f"{name}.{rank}.pt")
        except Exception:
            (folder / f"{name}.{rank}.error").write_text(traceback.format_exc())
