"""Releases of the packages that compute: which are needed, and which were tested. Imports none of them.

pip keeps to the oldest releases when it installs this package, but not when something else replaces them later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from typing import NamedTuple

from packaging.version import InvalidVersion, Version

from medvqa_rl import __version__
from medvqa_rl.core.text import printable


class Releases(NamedTuple):
    """The oldest and the newest release that were tested; patch releases are not told apart."""

    oldest: str
    newest: str

    def __str__(self) -> str:
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


TESTED: Mapping[str, Releases] = {
    "torch": Releases("2.11", "2.14"),
    "transformers": Releases("5.17", "5.24"),
    "peft": Releases("0.20", "0.21"),
    "accelerate": Releases("1.10", "1.15"),
    "vllm": Releases("0.32", "0.32"),
}
"""The oldest are the lower bounds in pyproject.toml. CONTRIBUTING.md says how a release gets here."""

ALWAYS = ("torch", "transformers", "peft", "accelerate")
"""Those that every command with a model uses."""


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = __version__ if name == "medvqa-rl" else metadata.version(name)
    return found


def check_installed(names: Iterable[str] = ALWAYS) -> str | None:
    """Check the installed releases.

    Returns:
        A warning that names those newer than what was tested, and how to go back; None if there are none.

    Raises:
        ValueError: a package is missing or too old.
    """
    names = tuple(names)
    versions = installed(names)
    for name in names:
        if name not in versions:
            raise ValueError(f"{name} is not installed: run `pip install '{name}>={TESTED[name].oldest}'`.")
        if is_too_old(name, versions[name]):
            raise ValueError(
                f"{name} {printable(versions[name])} is too old: run `pip install '{name}>={TESTED[name].oldest}'`."
            )
    new = [name for name in names if not was_tested(name, versions[name])]
    if not new:
        return None
    found = " and ".join(f"{name} {printable(versions[name])} (but with {TESTED[name]})" for name in new)
    back = " ".join(f"'{name}=={TESTED[name].newest}.*'" for name in new)
    return f"Warning: not tested with {found}; if something fails, `pip install {back}` goes back."


def is_too_old(name: str, version: str) -> bool:
    """Return whether a release is older than the oldest that was tested."""
    release = _release(version)
    return release is not None and release < _parse(TESTED[name].oldest)


def was_tested(name: str, version: str) -> bool:
    """Return whether a release is among those that were tested. One whose number cannot be read is not."""
    release = _release(version)
    return release is not None and _parse(TESTED[name].oldest) <= release <= _parse(TESTED[name].newest)


def _release(version: str) -> tuple[int, int] | None:
    """The first two numbers of a version; None if it has none."""
    try:
        return _parse(version)
    except InvalidVersion:
        return None


def _parse(version: str) -> tuple[int, int]:
    parsed = Version(version)
    return parsed.major, parsed.minor
