"""A process-wide guard that refuses every connection beyond this machine. Imports no torch.

``network: off`` in the settings, or ``medvqa-rl --network off VERB``, installs it before anything else runs. It is an
audit hook (PEP 578): Python reports every use of a socket to it, and later code cannot remove it. It does not see
native code, such as the collectives of torch.distributed, or other programs. Child processes of this package inherit
it through the environment.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any

VARIABLE = "MEDVQA_RL_NETWORK"
"""Environment variable that turns the network off for every verb."""

_LOCAL_FAMILIES = {getattr(socket, name) for name in ("AF_UNIX", "AF_NETLINK") if name in dir(socket)}
"""Address families that never leave the machine."""
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    VARIABLE: "off",
}
_is_off = False


class NetworkRefused(ConnectionError):
    """A connection beyond this machine was attempted while the network is off."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback one: 127.0.0.0/8, ::1, localhost and its subdomains.

    Names are not resolved; any other name counts as remote.
    """
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        number = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(number, "ipv4_mapped", None)
    return bool((mapped or number).is_loopback)


def is_off() -> bool:
    """Whether the guard is installed."""
    return _is_off


def forbid_network() -> None:
    """Refuse every connection, datagram and name lookup beyond this machine until the process ends, and set the
    offline switches of the libraries below for this process and its children."""
    global _is_off
    if _is_off:
        return
    _is_off = True
    os.environ.update(_OFFLINE)
    sys.addaudithook(_audit)
    # These resolve names before the audit hook is called, so they check the address themselves.
    for name in ("connect", "connect_ex", "sendto"):
        _check_first(name)


def _check_first(name: str) -> None:
    """Make a method of ``socket.socket`` check its address, the last argument, first."""
    original = getattr(socket.socket, name)

    def method(self: socket.socket, *args: Any) -> Any:
        _check_address(self, args[-1] if args else None)
        return original(self, *args)

    setattr(socket.socket, name, method)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """The audit hook. It is called for many events, so it returns at once for those that are not about sockets."""
    if not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        _check_address(args[0], args[1])
    elif event == "socket.getnameinfo":
        _check_host(args[0][0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        _check_host(args[0])


def _check_address(sock: Any, address: Any) -> None:
    if address is None or sock.family in _LOCAL_FAMILIES:
        return
    _check_host(address[0] if isinstance(address, tuple) and address else repr(address))


def _check_host(host: Any) -> None:
    """Raise NetworkRefused for a remote host. No host and the unspecified address are those of listening servers."""
    name = host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else host
    if name in (None, "", "0.0.0.0", "::") or (isinstance(name, str) and is_loopback(name)):
        return
    raise NetworkRefused(
        f"A connection to {name} was refused because the network is off: put the files on this machine, or set "
        "network=on."
    )
