"""No connection but to this machine: a guard for the whole process. Imports no torch.

``network: off`` in the settings, or ``medvqa-rl --network off VERB``, installs it before anything else runs. Python
reports every use of a socket to audit hooks (PEP 578), which nothing that runs later can take away; ours raises.
What is not Python is not asked: the collective communication of torch.distributed, and other programs that are
started. Child processes of this package inherit it through the environment.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from typing import Any

VARIABLE = "MEDVQA_RL_NETWORK"
"""Environment variable that switches the network off for every verb."""

_LOCAL_FAMILIES = {getattr(socket, name) for name in ("AF_UNIX", "AF_NETLINK") if name in dir(socket)}
"""Kinds of sockets that never leave the machine: files, and the kernel."""
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
    """Something wanted to leave this machine although the network is off."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own: 127.0.0.0/8, ::1, localhost and names below it.

    No name is looked up: any other one counts as outside.
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
    """From now on, until the process ends, refuse every connection, datagram and look-up beyond this machine; tell
    the libraries below, and child processes, to be offline."""
    global _is_off
    if _is_off:
        return
    _is_off = True
    os.environ.update(_OFFLINE)
    sys.addaudithook(_audit)
    # A name given to these is looked up before the hook is asked, so they ask themselves.
    for name in ("connect", "connect_ex", "sendto"):
        _check_first(name)


def _check_first(name: str) -> None:
    """Let a method of all sockets check its address, the last argument, before anything else."""
    original = getattr(socket.socket, name)

    def method(self: socket.socket, *args: Any) -> Any:
        _check_address(self, args[-1] if args else None)
        return original(self, *args)

    setattr(socket.socket, name, method)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: called for many things, so what is not about sockets must leave at once."""
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
    """Refuse a host that is not this machine; none and the unspecified address are where servers listen.

    Raises:
        NetworkRefused: it is another.
    """
    name = host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else host
    if name in (None, "", "0.0.0.0", "::") or (isinstance(name, str) and is_loopback(name)):
        return
    raise NetworkRefused(
        f"A connection to {name} was refused, because the network is off: what is needed must be on this machine; or "
        "set network=on."
    )
