"""Custom reward functions, given by dotted path and called with TRL's signature. Imports no torch.

A function that works with TRL's ``GRPOTrainer`` works here::

    def short_reasoning(prompts, completions, completion_ids, **kwargs):
        return [1.0 if len(ids) < 100 else 0.0 for ids in completion_ids]

and in the settings ``rewards.functions: {my_rewards.short_reasoning: 0.5}``.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.types import Group

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class TrainerState:
    """The fields of ``transformers.TrainerState`` that reward functions can read."""

    global_step: int
    """Optimizer steps done."""


def load_function(path: str) -> RewardFunction:
    """Import a reward function by its dotted path, such as ``my_rewards.short_reasoning``.

    Modules in the working directory are found too, after installed ones.

    Raises:
        ValueError: the path is not dotted, the module or the name does not exist, or the object cannot be called with
            TRL's signature. Errors inside the module propagate unchanged.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(
            f"The reward function {path!r} is not a dotted path: write it as package.module.function, "
            "for example my_rewards.short_reasoning."
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # something that the user's module imports is missing
        raise ValueError(
            f"The reward function {path!r} cannot be loaded because there is no module {error.name!r}: "
            "install it, or start from the folder that contains it."
        ) from error
    if name not in vars(module):
        raise ValueError(f"The reward function {path!r} cannot be loaded: module {module_name!r} has no {name!r}.")
    function: RewardFunction = vars(module)[name]
    _check_signature(path, function)
    return function


def _check_signature(path: str, function: object) -> None:
    what = "a function (prompts, completions, completion_ids, **kwargs) that returns one float or None per completion"
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"The reward {path!r} is a {type(function).__name__}, but it must be {what}.")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"The reward function {path!r} is asynchronous, but it must be {what}; remove its async.")
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"The reward function {path!r} does not take **kwargs, but it must be {what}: "
            "add **kwargs to its parameters, since it receives more columns than it names."
        )


def _columns(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The samples' fields as TRL passes data set columns, one value per completion. ``solution``, TRL's usual name, is
    the gold answer."""
    samples = [group.sample for group in groups for _ in group.completions]
    return {
        "solution": [sample.answer for sample in samples],
        "answer": [sample.answer for sample in samples],
        "answer_text": [sample.answer_text for sample in samples],
        "answer_type": [sample.answer_type for sample in samples],
        "question": [sample.question for sample in samples],
        "options": [list(sample.options) for sample in samples],
        "id": [sample.id for sample in samples],
        "image_key": [sample.image_key for sample in samples],
        "groups": [dict(sample.groups) for sample in samples],
    }


@dataclass
class RewardLog:
    """What the parts of the reward log while they score."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Values by metric; their mean is logged."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """(B,) values by column of the sample files."""


def call_function(
    path: str, function: RewardFunction, groups: Sequence[Group], *, step: int, log: RewardLog
) -> NDArray[np.float64]:
    """Score completions with a user's function, called as TRL calls it.

    The function gets lists with one entry per completion, prompt by prompt: ``prompts`` (chat messages),
    ``completions`` (``[{"role": "assistant", "content": text}]``), ``completion_ids`` (token ids), the columns
    ``solution answer answer_text answer_type question options id image_key groups``, and ``images`` (decoded) if it
    names that parameter; further ``log_extra(column, values)``, ``log_metric(name, value)`` and ``trainer_state``
    (with ``global_step``).

    Returns:
        (B,) rewards; NaN (unscored) where the function returned None or a number that is not finite.

    Raises:
        ValueError: the function did not return one float or None per completion; the message names it. Exceptions
            raised by the function propagate with a note that names it.
    """

    def log_metric(name: str, value: float) -> None:
        log.metrics.setdefault(name, []).append(float(value))

    def log_extra(column: str, values: Sequence[Any]) -> None:
        log.columns[column] = list(values)

    columns = _columns(groups)
    if "images" in inspect.signature(function).parameters:
        images = [[image.load() for image in group.sample.images] for group in groups]
        columns["images"] = [loaded for loaded, group in zip(images, groups) for _ in group.completions]
    prompts = [render_prompt(group.sample, group.template).messages for group in groups for _ in group.completions]
    completions = [completion for group in groups for completion in group.completions]
    try:
        returned = function(
            prompts=prompts,
            completions=[[{"role": "assistant", "content": completion.text}] for completion in completions],
            completion_ids=[list(completion.token_ids) for completion in completions],
            **columns,
            log_extra=log_extra,
            log_metric=log_metric,
            trainer_state=TrainerState(step),
        )
    except Exception as error:
        error.add_note(f"This was raised by the reward function {path!r} in step {step}.")
        raise
    for column, values in log.columns.items():
        if len(values) != len(completions):
            raise ValueError(
                f"The reward function {path!r} logged {len(values)} values as {column!r} for {len(completions)} "
                "completions, but log_extra needs one per completion."
            )
    return _as_rewards(path, returned, len(completions))


def _as_rewards(path: str, returned: object, count: int) -> NDArray[np.float64]:
    """Check a user function's return value."""
    if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes, Mapping)):
        raise ValueError(
            f"The reward function {path!r} returned a {type(returned).__name__}, but it must return a list with "
            "one float or None per completion."
        )
    values = list(returned)
    if len(values) != count:
        raise ValueError(
            f"The reward function {path!r} returned {len(values)} rewards for {count} completions, but it must "
            "return exactly one float or None for each."
        )
    rewards = np.full(count, np.nan)
    for index, reward in enumerate(values):
        if reward is None:
            continue
        if not isinstance(reward, SupportsFloat):
            raise ValueError(
                f"The reward function {path!r} returned {reward!r} for completion {index}, but a reward is a float, "
                "or None where it does not apply."
            )
        number = float(reward)
        rewards[index] = number if math.isfinite(number) else np.nan
    return rewards
