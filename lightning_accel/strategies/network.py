"""Which network interface gloo uses, and what is wrong with one that was named."""

from __future__ import annotations

import os
import socket
import struct

from torch.distributed import ProcessGroupGloo

__all__ = ["choose_interface", "interface_problem", "interface_to", "is_loopback"]

VARIABLE = "GLOO_SOCKET_IFNAME"
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of linux/sockios.h


def interface_problem() -> str | None:
    """Say what is wrong with the interfaces that ``GLOO_SOCKET_IFNAME`` names, or ``None``."""
    names = os.environ.get(VARIABLE, "")
    for name in filter(None, names.split(",")):
        try:
            ProcessGroupGloo.create_device(interface=name)
        except RuntimeError as error:
            there = ", ".join(name for _, name in socket.if_nameindex())
            return (
                f"{VARIABLE}={names} names the network interface {name!r}, which gloo can't use on "
                f"{socket.gethostname()}: it has {there}. Set {VARIABLE} to the one that reaches the other machines "
                f"(`ip addr` lists them with their addresses), or unset it. The cause: {error}"
            )
    return None


def choose_interface(address: str) -> None:
    """Have gloo use the interface that reaches ``address``, where it would use the loopback one.

    Without a choice gloo uses the address that the machine's own name stands for. On many systems (Debian's are so
    installed) this is a loopback address, which no other machine can connect to.

    Args:
        address: Of the machine of rank 0.
    """
    if not os.environ.get(VARIABLE) and is_loopback():
        name = interface_to(address)
        if name is not None and name != interface_to("127.0.0.1"):
            os.environ[VARIABLE] = name


def is_loopback() -> bool:
    """Whether gloo, as things are set, listens on addresses that only this machine can connect to."""
    try:
        if names := os.environ.get(VARIABLE):
            addresses = [_address_of(name) for name in names.split(",")]
        else:
            addresses = [socket.gethostbyname(socket.gethostname())]
    except OSError:  # a name that stands for nothing: gloo then takes the loopback interface
        return not names
    return all(address.startswith("127.") for address in addresses)


def interface_to(address: str) -> str | None:
    """Return the network interface by which this machine reaches an address; ``None`` where it can't be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: it has the system choose the way
            own = probe.getsockname()[0]
        names = [name for _, name in socket.if_nameindex()]
    except OSError:
        return None
    return next((name for name in names if _address_of(name) == own), None)


def _address_of(name: str) -> str:
    """The IPv4 address of an interface; empty where it has none, or where it can't be told (not Linux)."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()))
    except (ImportError, OSError):
        return ""
    return socket.inet_ntoa(answer[20:24])
