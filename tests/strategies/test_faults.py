"""Faults at the start of a run end in an error on every rank that says what to do, and in seconds."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lightning_accel.strategies.network import choose_interface, interface_problem, interface_to, is_loopback
from tests.conformance.processes import made_once
from tests.strategies.fault_scenarios import SCENARIOS, STRATEGIES
from tests.strategies.launch import free_port, launch, outcome

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(400)]
MODULE = "tests.strategies.fault_scenarios"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(folder: Path) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            taken = str(other.getsockname()[1])
            ports = " ".join(str(free_port()) for _ in range(20))
            launch(MODULE, folder, list(SCENARIOS), TAKEN_PORT=taken, FREE_PORTS=ports)

    return made_once(tmp_path_factory, "faults", fill)


TOLD = {
    ("port in use", 0): ("can't use port", "Set MASTER_PORT to a free port on every rank"),
    ("port in use", 1): ("could not reach rank 0", "another program has the port"),
    ("rank 0 is missing", 1): ("could not reach rank 0", "Either rank 0 did not start"),
    ("rank 1 is missing", 0): ("Only 1 of 2 ranks came", "rank 1 did not", "raise `start_timeout`"),
    **{
        ("no such interface", rank): ("On rank 1: GLOO_SOCKET_IFNAME=nosuch names", "it has lo", "`ip addr` lists them")
        for rank in (0, 1)
    },
    **{("no compiler", rank): ("could not. It needs a C++ compiler and ninja",) for rank in (0, 1)},
    **{("dead build", rank): ("cpu_adam is being compiled", "remove it with `rm ") for rank in (0, 1)},
    **{("disk of one machine", rank): ("on rank 0, but not every rank has it",) for rank in (0, 1)},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), TOLD)
def test_every_rank_is_told(folder: Path, name: str, rank: int) -> None:
    results = outcome(folder, name, rank)
    assert len(results) in (1, len(STRATEGIES))
    for text, seconds in results:
        for part in TOLD[name, rank]:
            assert part in text
        assert seconds < 60  # a timeout of 1 or 2 s, on a busy machine; of the interface 300 s


@pytest.mark.slow
def test_nothing_is_built_without_a_compiler(folder: Path) -> None:
    assert outcome(folder, "no compiler")
    assert not list((folder / "extensions").rglob("*.so"))


def test_the_interface_that_reaches_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no.such.name.invalid") is None
    choose_interface("127.0.0.1")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert is_loopback() and interface_problem() is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nosuch")
    assert "names the network interface 'nosuch'" in (interface_problem() or "")
    choose_interface("127.0.0.1")  # what the user set stays
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo,nosuch"


def test_another_interface_only_where_gloo_would_take_the_loopback_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_accel.strategies.network as network

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(network, "interface_to", lambda address: "lo" if address == "127.0.0.1" else "eth7")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.1.2.3")
    choose_interface("10.1.2.4")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    choose_interface("10.1.2.4")
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "eth7"
