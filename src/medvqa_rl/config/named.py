"""Settings given by name in Python, as keyword arguments. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from medvqa_rl.config import ConfigError
from medvqa_rl.config.schema import SCHEMA, all_settings, one_of
from medvqa_rl.config.yaml import merge, split_path

SECTIONS = ("rollout", "loss", "train", "optimizer")
"""Where TRL's ``GRPOConfig`` has a setting whose name several of our sections share, in this order."""

_PATHS: dict[str, list[str]] = {}
for _path, _ in all_settings():
    _PATHS.setdefault(_path.rpartition(".")[2], []).append(_path)


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings from names.

    Args:
        settings: by section (``train={"steps": 3}``), by dotted path (``{"train.steps": 3}``), or by the last part of
            the path (``steps=3``). Of several settings with that last part, the one in :data:`SECTIONS` counts.

            An unknown name stays as it is.

    Raises:
        ConfigError: with a sentence for every name that stands for several settings.
    """
    problems: list[str] = []
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in settings.items():
        try:
            path = (name,) if name in SCHEMA["properties"] else split_path(name if "." in name else _find(name))
        except ConfigError as error:
            problems += error.problems
        else:
            found += _leaves(path, value) if isinstance(value, Mapping) and len(path) == 1 else [(path, _plain(value))]
    if problems:
        raise ConfigError(problems)
    return merge({}, found)


def _find(name: str) -> str:
    """The dotted path of the setting with a name, or the name if there is none."""
    paths = _PATHS.get(name, [])
    preferred = [f"{section}.{name}" for section in SECTIONS if f"{section}.{name}" in paths]
    if len(paths) > 1 and not preferred:
        raise ConfigError([f"{name} is {one_of(paths)}: write **{{'{paths[0]}': ...}} for the first of these."])
    return [*preferred, *paths, name][0]


def _leaves(path: tuple[str, ...], section: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """The settings of a section that is given as a mapping."""
    if not section:
        return [(path, {})]
    return [((*path, *split_path(str(name))), _plain(value)) for name, value in section.items()]


def _plain(value: Any) -> Any:
    """A value as JSON has it: paths are text."""
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
