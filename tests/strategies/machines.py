"""Two machines on one: network namespaces, each with a name of its own, and a cable (a veth pair) between them.

Where the system allows no namespaces (they need root and iproute2), both "machines" are this one: the two launchers
still run, on the loopback interface, and there is no cable to pull.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Machines", "two_machines"]


@dataclass(frozen=True)
class Machines:
    """Attributes:
    addresses: Of the two machines, as the other one reaches it.
    prefixes: What starts a command on each.
    spaces: The names of the namespaces; empty where there are none.
    """

    addresses: tuple[str, str]
    prefixes: tuple[list[str], list[str]]
    spaces: tuple[str, ...] = ()

    def set_cable(self, state: str) -> None:
        """Plug the cable in (``"up"``) or pull it (``"down"``)."""
        _ip("-n", self.spaces[1], "link", "set", "cable1", state)


@contextlib.contextmanager
def two_machines() -> Iterator[Machines]:
    """Make them, and take them away again."""
    tag = uuid.uuid4().hex[:6]
    spaces = (f"accel-{tag}-0", f"accel-{tag}-1")
    addresses = ("10.77.0.1", "10.77.0.2")
    try:
        try:
            for space in spaces:
                _ip("netns", "add", space)
            _ip(
                "link",
                "add",
                "cable0",
                "netns",
                spaces[0],
                "type",
                "veth",
                "peer",
                "name",
                "cable1",
                "netns",
                spaces[1],
            )
            for number, space in enumerate(spaces):
                _ip("-n", space, "addr", "add", f"{addresses[number]}/24", "dev", f"cable{number}")
                _ip("-n", space, "link", "set", "lo", "up")
                _ip("-n", space, "link", "set", f"cable{number}", "up")
            prefixes = [_command(space, f"machine-{number}") for number, space in enumerate(spaces)]
            for prefix in prefixes:
                subprocess.run([*prefix, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"") or str(error).encode()
            print(f"no network namespaces here ({reason.decode().strip()}): two launchers on the loopback interface")
            yield Machines(("127.0.0.1", "127.0.0.1"), ([], []))
        else:
            yield Machines(addresses, (prefixes[0], prefixes[1]), spaces)
    finally:
        for space in spaces:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def _command(space: str, name: str) -> list[str]:
    """Start in that network, under a host name of its own."""
    script = f'hostname {name} && exec "$@"'
    return ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", script, "sh"]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, env={**os.environ, "LC_ALL": "C"})
