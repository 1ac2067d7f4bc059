"""The arms of a recipe, and which arms they start from. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from medvqa_rl.core.embedded import SIZES
from medvqa_rl.core.text import number_of, shown
from medvqa_rl.study.plan.checks import check_folder_name, check_keys, check_name, overlay, section

Verb = Literal["none", "train", "sft", "build"]
"""``none`` evaluates the model without training it; ``build`` makes a phantom model of another size."""
VERBS: tuple[Verb, ...] = ("none", "train", "sft", "build")
_KEYS = ("verb", "from", "once", "seeds", "settings", "published", "traces", "data_by_seed", "size")
_OWN_WEIGHTS = ("path", "adapter", "revision")
"""Model settings that select the weights."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to obtain a model."""

    name: str
    verb: Verb
    settings: Mapping[str, Any]
    published: float | None
    """Accuracy in percent that the paper reports for its own model and data, if any."""
    start: str | None
    """The arm whose last checkpoint it starts from; None starts from the configured model."""
    once: bool
    """Whether it has a single cell, with the first seed, that is compared with every seed of the others: an untrained
    model, or a start that the other arms share."""
    num_seeds: int | None = None
    """How many of the study's seeds it is trained with, the first ones; None is all."""
    traces: int | None = None
    """Number of questions with reference reasoning that a supervised arm learns; None takes all of its data."""
    data_by_seed: bool = False
    """Whether the cell's seed is added to ``data.seed`` of its training, so that each seed draws its own questions."""
    size: str | None = None
    """Of the phantom model to build; None for other verbs."""

    @property
    def is_run(self) -> bool:
        """Whether its cells are training runs."""
        return self.verb in ("train", "sft")

    def settings_of(self, base: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The settings of the cell with a seed: those of the recipe, overlaid by the arm's."""
        settings = overlay(overlay(base, self.settings), {"train": {"seed": seed}})
        data = settings.get("data", {})
        if self.traces is not None:
            settings = overlay(settings, {"data": {"num_train": self.traces}})
        if self.data_by_seed and isinstance(data, dict) and type(own := data.get("seed", 0)) is int:
            settings = overlay(settings, {"data": {"seed": own + seed}})
        return settings

    def own(self, seeds: Sequence[int]) -> Sequence[int]:
        """Its seeds among those of the study."""
        return seeds[:1] if self.once else seeds[: self.num_seeds]


def read_arms(where: str, given: Mapping[str, Any]) -> dict[str, Arm]:
    """Read the arms by name, in the order of the recipe.

    Args:
        where: the recipe, for messages.
        given: the section ``arms``.

    Raises:
        ValueError: there are none, one is invalid, or they start from each other in a circle.
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
                    "first: remove from in one of them."
                )
    for name, arm in arms.items():
        if arm.verb == "none" and arm.start is not None and arms[arm.start].once:
            arms[name] = replace(arm, once=True)
    return arms


def _arm(where: str, name: str, given: Mapping[str, Any]) -> Arm:
    check_folder_name(where, "an arm", name)
    check_keys(f"{where}, arm {name},", given, _KEYS)
    verb, published, start, once = (given.get(key) for key in ("verb", "published", "from", "once"))
    num_seeds = given.get("seeds")
    if verb not in VERBS:
        raise ValueError(f"{where}, arm {name}, has verb {shown(verb)}, but must have one of {', '.join(VERBS)}.")
    if published is not None and type(published) not in (int, float):
        raise ValueError(f"{where}, arm {name}, has published {shown(published)}, but must have a number in percent.")
    if once is not None and type(once) is not bool:
        raise ValueError(f"{where}, arm {name}, has once {shown(once)}, but must have true (one seed only) or false.")
    if num_seeds is not None and (type(num_seeds) is not int or num_seeds < 1 or once):
        raise ValueError(
            f"{where}, arm {name}, has seeds {shown(num_seeds)}, but must have the number of the study's seeds to "
            "use, at least 1, and no once."
        )
    if start is not None and not isinstance(start, str):
        raise ValueError(f"{where}, arm {name}, has from {shown(start)}, but must name one arm to start from.")
    traces, by_seed = given.get("traces"), given.get("data_by_seed")
    if traces is not None and (type(traces) is not int or traces < 1 or verb != "sft"):
        raise ValueError(
            f"{where}, arm {name}, has traces {shown(traces)}, but only an arm with verb sft learns reasoning, from a "
            "whole number of questions of at least 1: remove traces, or set both."
        )
    if by_seed is not None and type(by_seed) is not bool:
        raise ValueError(f"{where}, arm {name}, has data_by_seed {shown(by_seed)}, but must have true or false.")
    settings = section(where, f"arms.{name}.settings", given.get("settings"))
    size = given.get("size")
    if (verb == "build") != (size is not None) or (verb == "build" and not given.keys() <= {"verb", "size", "once"}):
        raise ValueError(
            f"{where}, arm {name}, has {', '.join(given)}, but an arm with verb build has a size and nothing else, "
            f"and no other arm has one: write {{verb: build, size: {SIZES[0]}}}, with one of {', '.join(SIZES)}."
        )
    if verb == "build":
        check_name(f"{where}, arm {name},", "size", str(size), SIZES)
    is_once = bool(once) or verb == "build" or (verb == "none" and start is None)
    return Arm(name, cast(Verb, verb), settings, published, start, is_once, num_seeds, traces, bool(by_seed), size)


def _check_start(where: str, arm: Arm, arms: Mapping[str, Arm]) -> None:
    if arm.start is None:
        return
    check_name(f"{where}, arm {arm.name}, under from,", "arm", arm.start, arms)
    if arms[arm.start].verb == "none":
        raise ValueError(
            f"{where}, arm {arm.name}, has from {shown(arm.start)}, but that arm is not trained (verb none) and "
            "has no "
            "checkpoint: set model.path instead, or name an arm with verb train, sft or build."
        )
    if not arms[arm.start].once and (most := arms[arm.start].num_seeds) and (arm.num_seeds or most + 1) > most:
        raise ValueError(
            f"{where}, arm {arm.name}, starts from {arm.start}, which is trained with {number_of(most, 'seed')} only: "
            f"give it seeds: {most}, or fewer."
        )
    own = section(where, f"arms.{arm.name}.settings.model", arm.settings.get("model"))
    if given := [f"model.{key}" for key in _OWN_WEIGHTS if own.get(key) is not None]:
        raise ValueError(
            f"{where}, arm {arm.name}, has both from {shown(arm.start)} and {given[0]}, but can start from one "
            "model only: remove one of them."
        )


def with_starts(names: Sequence[str], arms: Mapping[str, Arm]) -> set[str]:
    """Return the named arms and all arms that they start from."""
    found: set[str] = set()
    for name in names:
        following: str | None = name
        while following is not None:
            found.add(following)
            following = arms[following].start
    return found
