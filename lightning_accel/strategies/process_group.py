"""A process group that a restarted run can join, and that says what happened when a rank is lost.

``torchrun`` keeps one store for all restarts of a run, and torch's own start-up reads the addresses that ranks of the
last start left there: they are dead, so that a restart under gloo fails as well. Here the ranks of one start meet
first. Rank 0 opens a round in the store and waits for the others; who belongs to an earlier start is left out, and the
process group is made under the round's name. Counting ``TORCHELASTIC_RESTART_COUNT`` is not enough: with two machines
each agent counts its own restarts.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed does not declare them
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from lightning_accel.errors import check_number
from lightning_accel.strategies.network import choose_interface, interface_problem, is_loopback

__all__ = [
    "DEFAULT_START_TIMEOUT",
    "DEFAULT_TIMEOUT",
    "Environment",
    "apply_timeout",
    "check_timeouts",
    "explain_lost_peer",
    "init_process_group",
]

T = TypeVar("T")

DEFAULT_TIMEOUT = 1800.0
"""How long a collective may take, in seconds: torch's own default."""
DEFAULT_START_TIMEOUT = 300.0
"""How long ranks wait for one another at the start, in seconds."""

_LOST = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Socket closed|remote process exited|Connection refused|"
    r"no error|failed to (send|recv)|Application timeout|ncclRemoteError|ncclSystemError",
    re.IGNORECASE,
)
_GRACE = 2.0  # seconds that what has a limit of its own may take longer
_LATE = re.compile(r"timed? ?out|timeout", re.IGNORECASE)


class Environment(Protocol):
    """What is needed of Lightning's ``ClusterEnvironment``."""

    @property
    def main_address(self) -> str:
        """Where rank 0 is."""

    @property
    def main_port(self) -> int:
        """The port of the store."""

    def global_rank(self) -> int:
        """The rank of this process."""

    def world_size(self) -> int:
        """How many processes there are."""


# Of the process group that was made last: one entry a rank, with "host" and "pid".
_peers: list[dict[str, Any]] = []
_timeout = DEFAULT_TIMEOUT


def check_timeouts(timeout: float, start_timeout: float) -> dict[str, float]:
    """Return both as :func:`init_process_group` takes them.

    Raises:
        TypeError: If one is not a number.
        ValueError: If one is not a finite number above 0.
    """
    return {
        name: check_number(name, value, 0, math.inf, open_low=True, open_high=True)
        for name, value in (("timeout", timeout), ("start_timeout", start_timeout))
    }


def init_process_group(
    environment: Environment,
    backend: str,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    start_timeout: float = DEFAULT_START_TIMEOUT,
    device_id: torch.device | None = None,
) -> None:
    """Make the default process group; does nothing where there is one already.

    Args:
        environment: Says where rank 0 is, and which rank this is: a Lightning ``ClusterEnvironment``.
        backend: ``"gloo"``, ``"nccl"``, ...
        timeout: How long a collective may take before it fails, in seconds.
        start_timeout: How long to wait for the other ranks at the start, in seconds.
        device_id: The rank's GPU, to which NCCL is then bound.

    Raises:
        RuntimeError: Where the port is in use, rank 0 can't be reached, or a rank did not come; it says which.
    """
    global _timeout
    if dist.is_initialized():
        return
    rank, world_size = environment.global_rank(), environment.world_size()
    address, port = environment.main_address, environment.main_port
    # for code that reads them, as Lightning and torch's own start-up set them
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    where = f"MASTER_ADDR={address} MASTER_PORT={port}"
    gloo = "gloo" in backend and world_size > 1
    me: dict[str, Any] = {"host": socket.gethostname(), "space": _pid_space(), "pid": os.getpid()}
    if gloo:
        choose_interface(address)
        me.update(problem=interface_problem(), only_here=is_loopback())
    store = _open_store(address, port, rank, start_timeout)
    try:
        name, peers = _within(start_timeout + _GRACE, _meet, store, rank, world_size, me, start_timeout, where)
    except (dist.DistError, TimeoutError) as error:
        raise RuntimeError(
            f"Rank {rank} lost rank 0 at {where} while it waited for the other ranks: see the output of rank 0 for the "
            f"reason, or the network is down. The cause: {error}"
        ) from error
    store.set_timeout(timedelta(seconds=timeout))
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore(name, store),
            rank=rank,
            world_size=world_size,
            # gloo waits five times as long for a connection: that is part of the start
            timeout=timedelta(seconds=start_timeout / 5 if gloo else timeout),
            device_id=device_id,
        )
        if gloo:
            _set_pg_timeout(timedelta(seconds=timeout))
    except (dist.DistError, RuntimeError) as error:
        variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        raise RuntimeError(
            f"Rank {rank}: all {world_size} ranks met at {where}, but could not connect with one another over "
            f"{backend}. Where a machine has several network interfaces, set {variable} to the one that reaches the "
            f"other machines (`ip addr` lists them); and see that no firewall is between them, since they use ports "
            f"that the system chooses. The cause: {error}"
        ) from error
    _peers[:] = peers
    _timeout = timeout
    if backend == "nccl":
        atexit.register(_destroy)


def apply_timeout() -> None:
    """Give the groups that others made since (DeepSpeed, device meshes) the timeout, in place of torch's own."""
    for group, (backend, _) in list(_world.pg_map.items()):
        if "gloo" in str(backend) or "nccl" in str(backend):
            _set_pg_timeout(timedelta(seconds=_timeout), group)


def _open_store(address: str, port: int, rank: int, timeout: float) -> TCPStore:
    """Connect to the store; rank 0 serves it, unless torchrun's agent does."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return _within(
            timeout + _GRACE,
            TCPStore,
            address,
            port,
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise RuntimeError(
                f"Rank 0 can't use port {port}, since another process does: perhaps a run that is still going, or that "
                f"was left over (`ss -ltnp 'sport = :{port}'` shows it). Set MASTER_PORT to a free port on every rank."
            ) from error
        if serves:
            raise RuntimeError(f"Rank 0 can't serve at port {port}: {text}") from error
        raise RuntimeError(
            f"Rank {rank} could not reach rank 0 at MASTER_ADDR={address} MASTER_PORT={port} within "
            f"{timeout:g} s. Either rank 0 did not start (its own output says why), or the address is not the one of "
            f"its machine, or another program has the port, or a firewall is between. The cause: {text}"
        ) from error


def _within(seconds: float, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function that may never return: torch's store waits without end for a server that does not answer.

    Raises:
        TimeoutError: After so many seconds. The call then goes on in its thread, which does not keep the process.
    """
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((function(*args, **kwargs), None))
        except Exception as error:
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError(f"no answer for {seconds:g} s")
    result, error = done[0]
    if error is not None:
        raise error
    value: T = result
    return value


def _meet(
    store: Store, rank: int, world_size: int, me: dict[str, Any], timeout: float, where: str
) -> tuple[str, list[dict[str, Any]]]:
    """Wait until every rank of this start is there; return the round's name and who they are.

    Rank 0 decides whether the run can start, and all say the same.
    """
    me = {**me, "token": uuid.uuid4().hex}
    deadline = time.monotonic() + timeout
    number = store.add("accel/round", 1) if rank == 0 else 0
    pause = 0.01
    late = False
    while not late:
        late = time.monotonic() > deadline
        if rank > 0:
            number = store.add("accel/round", 0)  # 0 until rank 0 has opened the first
        if number > 0:
            store.set(f"accel/{number}/rank{rank}", json.dumps(me))
            if rank == 0:
                came = [peer for peer in range(world_size) if store.check([f"accel/{number}/rank{peer}"])]
                if late or len(came) == world_size:
                    peers = {peer: json.loads(store.get(f"accel/{number}/rank{peer}")) for peer in came}
                    problem = _problem(peers, world_size, timeout, where)
                    store.set(f"accel/{number}/all", json.dumps({"peers": list(peers.values()), "problem": problem}))
                    if problem:
                        _linger(store, number, len(came) - 1)
                        raise RuntimeError(problem)
                    return f"accel/{number}", list(peers.values())
            elif store.check([f"accel/{number}/all"]):
                answer = json.loads(store.get(f"accel/{number}/all"))
                # otherwise the round is that of an earlier start, and rank 0 has not opened ours yet
                if me["token"] in [peer["token"] for peer in answer["peers"]]:
                    if answer["problem"]:
                        store.add(f"accel/{number}/seen", 1)
                        raise RuntimeError(answer["problem"])
                    return f"accel/{number}", answer["peers"]
        time.sleep(pause)
        pause = min(0.25, pause * 1.2)
    raise RuntimeError(f"Rank {rank} waited {timeout:g} s at {where} for rank 0, who did not come. {_LOOK}")


_LOOK = (
    "Look at the output of the missing ranks for an error, and see that every machine starts its ranks with the same "
    "MASTER_ADDR, MASTER_PORT, WORLD_SIZE and strategy, and that no other run uses this port. If they only start "
    "slowly, raise `start_timeout`."
)


def _problem(peers: dict[int, dict[str, Any]], world_size: int, timeout: float, where: str) -> str:
    """Why the ranks that came can't start; empty where they can."""
    if missing := [peer for peer in range(world_size) if peer not in peers]:
        return (
            f"Only {len(peers)} of {world_size} ranks came to {where} within {timeout:g} s: {_ranks(missing)} did not. "
            f"{_LOOK}"
        )
    if problems := [f"On rank {rank}: {peer['problem']}" for rank, peer in peers.items() if peer.get("problem")]:
        return " ".join(problems)
    hosts = {peer["host"] for peer in peers.values()}
    if len(hosts) > 1 and (stuck := [rank for rank, peer in peers.items() if peer.get("only_here")]):
        return (
            f"The ranks are on {len(hosts)} machines ({', '.join(sorted(hosts))}), but gloo would use the loopback "
            f"interface on {_ranks(stuck)}, which no other machine can connect to. Set GLOO_SOCKET_IFNAME there to the "
            "interface that reaches the other machines (`ip addr` lists them)."
        )
    return ""


def _linger(store: Store, number: int, others: int) -> None:
    """Serve the store until the others have read what the problem is."""
    deadline = time.monotonic() + 5
    while store.add(f"accel/{number}/seen", 0) < others and time.monotonic() < deadline:
        time.sleep(0.05)


def explain_lost_peer(exception: BaseException) -> None:
    """Put in front of the message of a broken connection which rank is gone and what comes next.

    The message is changed in place, so that the exception keeps its type and its traceback. Other exceptions are left
    alone.
    """
    text = str(exception)
    of_backend = isinstance(exception, dist.DistError) or "gloo" in text or "NCCL" in text
    if not of_backend or not (_LOST.search(text) or _LATE.search(text)):
        return
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    gone, elsewhere = _find_gone(rank)
    if gone:
        who = " and ".join(f"rank {peer} (process {_peers[peer]['pid']} on {_peers[peer]['host']})" for peer in gone)
        what = f"{who[0].upper()}{who[1:]} {'is' if len(gone) == 1 else 'are'} gone: killed or crashed"
    elif _LATE.search(text) and not _LOST.search(text):
        with_whom = f" with {_ranks(elsewhere)} on {_hosts(elsewhere)}" if elsewhere else " with a rank"
        what = (
            f"Lost contact{with_whom}: no answer for {_timeout:g} s. The network is down, or a rank is stuck or far "
            "behind (if it only needs longer, raise the strategy's `timeout`)"
        )
    elif elsewhere:
        what = f"Lost contact with {_ranks(elsewhere)} on {_hosts(elsewhere)}: it failed, or the network did"
    else:
        what = "A rank closed its connection: it failed, or it was killed"
    message = f"{what}. So rank {rank} can't go on. {_what_next()}\n\nThe cause: {text}"
    exception.args = (message, *exception.args[1:])


def _find_gone(rank: int, seconds: float = 1.0) -> tuple[list[int], list[int]]:
    """The ranks of this machine whose process has ended, and the ranks of other machines."""
    if rank >= len(_peers):
        return [], []
    mine = (_peers[rank]["host"], _peers[rank]["space"])
    here = [peer for peer, is_at in enumerate(_peers) if (is_at["host"], is_at["space"]) == mine and peer != rank]
    elsewhere = [peer for peer, is_at in enumerate(_peers) if peer not in here and peer != rank]
    deadline = time.monotonic() + seconds
    while True:  # a killed process closes its connections a little before it is gone
        gone = [peer for peer in here if not _is_alive(_peers[peer]["pid"])]
        if gone or time.monotonic() > deadline or not here:
            return gone, elsewhere
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")  # not waiting for its parent
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no /proc: it exists
        return True


def _pid_space() -> str:
    """Which table of processes this is: containers on one machine have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _what_next() -> str:
    if (restarts := os.environ.get("TORCHELASTIC_MAX_RESTARTS")) is not None:
        done = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if done >= int(restarts):
            return f"torchrun has no restart left (--max-restarts {restarts})."
        return (
            f"torchrun now starts all ranks again (restart {done + 1} of {restarts}); with AutoResume they go on from "
            "the newest complete checkpoint."
        )
    return "Start the run again; with AutoResume it goes on from the newest complete checkpoint."


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


def _hosts(ranks: list[int]) -> str:
    return ", ".join(sorted({_peers[peer]["host"] for peer in ranks}))


def _destroy() -> None:
    """At exit, since NCCL warns about a group that is left; not to be broken off by a second Ctrl+C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    if dist.is_initialized():
        dist.destroy_process_group()
    signal.signal(signal.SIGINT, before)
