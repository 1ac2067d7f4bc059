"""Checks that all sections of a recipe share. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medvqa_rl.config.schema import did_you_mean
from medvqa_rl.core.text import shown


def check_name(where: str, what: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError if a recipe names something unknown.

    Args:
        where: the place in the recipe; begins the message.
        what: kind of the name, such as ``arm``.
        name: as given.
        known: the allowed names.
    """
    if name not in (known := list(known)):
        raise ValueError(
            f"{where} has the unknown {what} {shown(name)}: use one of {', '.join(known)}"
            + (did_you_mean(name, known) or ".")
        )


def check_folder_name(where: str, what: str, name: str) -> None:
    """Raise ValueError if a name cannot be part of the name of a folder."""
    if not re.fullmatch(r"[\w.-]{1,100}", name) or set(name) == {"."}:
        raise ValueError(
            f"{where} has {what} {shown(name)}, but names are made of letters, digits, '_', '.' and '-', at most 100."
        )


def check_keys(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError if a section has an unknown key."""
    for key in given:
        check_name(where, "key", key, known)


def section(where: str, key: str, value: Any) -> dict[str, Any]:
    """Return a value that must be a section; null is an empty one.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} has {shown(value)} as {key}, but it must be a section (name: value).")
    return value


def sections(where: str, key: str, value: Any, content: str) -> list[Mapping[str, Any]]:
    """Return a value that must be a list of sections; null is an empty one.

    Args:
        where: the place in the recipe; begins the message.
        key: of the value.
        value: as given.
        content: what each section holds, for the message.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{where} has {shown(value)} as {key}, but it must be a list of sections with {content}.")
    return value


def overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Put nested settings over others; lists are replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
