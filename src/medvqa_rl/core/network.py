"""What may use the network, and with which key: proxies, telemetry, API keys, the processes of one launch, and a guard
against every connection beyond this machine. No torch.

:func:`spare_this_machine` keeps requests to this machine away from the environment's proxies.

``network: off`` in the settings, or ``medvqa-rl --network off VERB``, installs the guard before anything else runs.
It is an audit hook (PEP 578): Python reports every use of a socket to it, and later code cannot remove it. It does
not see native code, such as the collectives of torch.distributed, or other programs. Child processes of this package
inherit it through the environment.
"""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from medvqa_rl.core.progress import heartbeat

VARIABLE = "MEDVQA_RL_NETWORK"
"""Environment variable that turns the network off for every verb."""

PATIENCE = 30.0
"""Seconds after which a process says that it waits for the others of its launch."""

_LOCAL_FAMILIES = {getattr(socket, name) for name in ("AF_UNIX", "AF_NETLINK") if name in dir(socket)}
"""Address families that never leave the machine."""
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    VARIABLE: "off",
}
NO_TELEMETRY = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment variables that turn off the telemetry of the libraries below."""
_THIS_MACHINE = ("localhost", ".localhost", "127.0.0.0/8", "127.0.0.1", "0.0.0.0", "::1")
"""Entries of NO_PROXY; some clients take networks, others single addresses only."""
_is_off = False


class NetworkRefused(ConnectionError):
    """A connection beyond this machine was attempted while the network is off."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine: 127.0.0.0/8, ::1, localhost and its subdomains, and the
    unspecified addresses, which connect to this machine.

    Names are not resolved; any other name counts as remote.
    """
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        number = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    number = getattr(number, "ipv4_mapped", None) or number
    return number.is_loopback or number.is_unspecified


def is_on_this_machine(url: str) -> bool:
    """Whether a URL's host is this machine, so that no proxy may see the request (:func:`is_loopback`)."""
    return is_loopback(urlsplit(url).hostname or "")


def spare_this_machine() -> None:
    """Make clients that follow the environment's proxies, here and in child processes, connect to this machine
    directly, and turn off the telemetry of the libraries below unless the environment asks for it."""
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
    given = urllib.request.getproxies_environment().get("no", "")
    entries = [entry.strip() for entry in given.split(",") if entry.strip()]
    if "*" not in entries:
        entries += [entry for entry in _THIS_MACHINE if entry not in entries]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(entries)


def unusable_proxy() -> str | None:
    """The environment's first proxy that HTTP clients in Python refuse (with an exception when they are created), as
    ``all_proxy (socks5)``, or None: another scheme than HTTP, or SOCKS without the package ``socksio``."""
    proxies = urllib.request.getproxies()
    if "*" in (entry.strip() for entry in proxies.get("no", "").split(",")):
        return None
    usable = ["http", "https"] + ["socks5", "socks5h"] * (importlib.util.find_spec("socksio") is not None)
    for name in ("http", "https", "all"):
        scheme, separator, _ = proxies.get(name, "").partition("://")
        if separator and scheme.lower() not in usable:
            return f"{name}_proxy ({scheme.lower()})"
    return None


@contextmanager
def joining() -> Iterator[None]:
    """Within the block this process joins the others of its launch. Every rank that waits longer than usual says so.

    Raises:
        ValueError: the port of the launch is in use.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, num_ranks, address, port = (os.environ.get(name, "") for name in names)
    line = (
        f"Rank {rank} of {num_ranks} still waits for the others at {address}:{port}: check that all of them were "
        "started, with the same MASTER_ADDR and MASTER_PORT."
    )
    try:
        with heartbeat(
            lambda seconds: line if seconds > PATIENCE else "", partial(print, file=sys.stderr, flush=True)
        ):
            yield
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"MASTER_PORT is {port}, but this port is in use, so the {num_ranks} processes of this launch cannot find "
            "each other: set MASTER_PORT to a free port for all of them, or let --gpus choose one."
        ) from error


def read_key(variable: str | None) -> str:
    """Return the API key of a judge's endpoint, which no file stores, or a placeholder if none is set,
    because the client requires some text.

    Args:
        variable: name of the environment variable, ``judge.api_key_env``.

    Raises:
        ValueError: the environment has no such variable, or it is empty.
    """
    if variable is None:
        return "none"
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(
            f"judge.api_key_env is {variable}, but the environment has no such variable: set it to the key "
            "(never write keys into files), or set judge.api_key_env to null for an endpoint without keys."
        )
    return key


def is_off() -> bool:
    """Whether the guard is installed."""
    return _is_off


def forbid_network() -> None:
    """Refuse every connection, datagram and name lookup beyond this machine until the process ends, and set the
    offline switches of the libraries below, without proxies, for this process and its children."""
    global _is_off
    if _is_off:
        return
    _is_off = True
    # A proxy on this machine would carry requests elsewhere.
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ.update(_OFFLINE | NO_TELEMETRY | {"NO_PROXY": "*", "no_proxy": "*"})
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
    """Raise NetworkRefused for a remote host. A listening server may have no host."""
    name = host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else host
    if name in (None, "") or (isinstance(name, str) and is_loopback(name)):
        return
    raise NetworkRefused(
        f"A connection to {name} was refused because the network is off: put the files on this machine, or set "
        "network=on."
    )


def bound_socket(host: str, port: int) -> socket.socket:
    """Take this address for a server, which may begin to listen later.

    Raises:
        ValueError: the address is taken or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"Port {port} of {host} is in use by another program: end that, or choose another with --port "
                f"{port + 1 if port < 65535 else 0}."
            ) from error
        if error.errno == errno.EACCES:
            raise ValueError(f"Port {port} needs more rights than you have: choose one above 1023 with --port.") from (
                error
            )
        raise ValueError(
            f"--host is {host!r}, which is no address of this machine ({error.strerror or error}): leave it out, or "
            "give 0.0.0.0 for all of them."
        ) from error
    return listener
