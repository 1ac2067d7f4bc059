"""The arms of a recipe, the order in which they start from each other, and sections of a recipe. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from medvqa_rl.config.schema import did_you_mean

Verb = Literal["none", "train", "sft"]
"""none evaluates the model as it is."""
VERBS: tuple[Verb, ...] = ("none", "train", "sft")
_KEYS = ("verb", "from", "once", "settings", "published")
_OWN_WEIGHTS = ("path", "adapter", "revision")
"""Settings of a model that say where its weights come from."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to come by a model."""

    name: str
    verb: Verb
    settings: Mapping[str, Any]
    published: float | None
    """Accuracy in percent that the paper reports for its own model and data; None where it reports none."""
    start: str | None
    """The arm whose last checkpoint it starts from; None takes the model of the settings."""
    once: bool
    """One cell, with the first seed, that stands beside every seed of the others: what is not trained, and what
    they share as their start."""


def check_keys(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse names that a section cannot have."""
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has {key}, but may have {', '.join(known)}" + (did_you_mean(key, known) or "."))


def section(where: str, key: str, value: Any) -> dict[str, Any]:
    """A value that must be a section; null is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} has {value!r} as {key}, but it must be a section (name: value).")
    return value


def read_arms(where: str, given: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms by name, in the order of the recipe.

    Args:
        where: the recipe, for messages.
        given: what stands under ``arms``.

    Raises:
        ValueError: there are none, one of them is wrong, or they start from each other in a way that has no beginning.
    """
    if not given:
        raise ValueError(f"{where} has no arms: name at least one, such as arms: {{grpo: {{verb: train}}}}.")
    arms = {name: _arm(where, name, section(where, f"arms.{name}", value)) for name, value in given.items()}
    for arm in arms.values():
        _check_start(where, arm, arms)
    for arm in arms.values():
        path = [arm.name]
        while (start := arms[path[-1]].start) is not None:
            path.append(start)
            if start in path[:-1]:
                raise ValueError(
                    f"{where} has arms that start from each other ({' from '.join(path)}), so none can be trained "
                    "first: take from out of one of them."
                )
    return arms


def _arm(where: str, name: str, given: Mapping[str, Any]) -> Arm:
    check_keys(f"{where}, arm {name},", given, _KEYS)
    verb, published, start, once = (given.get(key) for key in ("verb", "published", "from", "once"))
    if verb not in VERBS:
        raise ValueError(f"{where}, arm {name}, has verb {verb!r}, but must have one of {', '.join(VERBS)}.")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{where} has an arm {name!r}, but names are made of letters, digits, '_', '.' and '-'.")
    if published is not None and type(published) not in (int, float):
        raise ValueError(f"{where}, arm {name}, has published {published!r}, but must have a number in percent.")
    if once is not None and type(once) is not bool:
        raise ValueError(f"{where}, arm {name}, has once {once!r}, but must have true (one seed only) or false.")
    if start is not None and not isinstance(start, str):
        raise ValueError(f"{where}, arm {name}, has from {start!r}, but must name one arm to start from.")
    settings = section(where, f"arms.{name}.settings", given.get("settings"))
    return Arm(name, cast(Verb, verb), settings, published, start, bool(once) or verb == "none")


def _check_start(where: str, arm: Arm, arms: Mapping[str, Arm]) -> None:
    if arm.start is None:
        return
    if arm.start not in arms:
        raise ValueError(
            f"{where}, arm {arm.name}, has from {arm.start!r}, but must name one of the arms {', '.join(arms)}"
            + (did_you_mean(arm.start, arms) or ".")
        )
    if arms[arm.start].verb == "none":
        raise ValueError(
            f"{where}, arm {arm.name}, has from {arm.start!r}, but that arm is not trained (verb none), so it leaves "
            "no checkpoint: set model.path instead, or name an arm with verb train or sft."
        )
    own = section(where, f"arms.{arm.name}.settings.model", arm.settings.get("model"))
    if given := [f"model.{key}" for key in _OWN_WEIGHTS if own.get(key) is not None]:
        raise ValueError(
            f"{where}, arm {arm.name}, has both from {arm.start!r} and {given[0]}, but starts from one model: leave "
            "one of them out."
        )


def with_starts(names: Sequence[str], arms: Mapping[str, Arm]) -> set[str]:
    """The named arms with all that they start from."""
    found: set[str] = set()
    for name in names:
        following: str | None = name
        while following is not None:
            found.add(following)
            following = arms[following].start
    return found
