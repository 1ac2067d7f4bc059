"""Custom reward functions, given by dotted path and called with TRL's signature. Imports no torch.

A function that works with TRL's ``GRPOTrainer`` works here::

    def short_reasoning(prompts, completions, completion_ids, **kwargs):
        return [1.0 if len(ids) < 100 else 0.0 for ids in completion_ids]

and in the settings ``rewards.functions: {my_rewards.short_reasoning: 0.5}``. Asynchronous functions (``async def``) of
a step are awaited together.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

from medvqa_rl.core.progress import to_stderr
from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.text import number_of, printable, shown
from medvqa_rl.core.types import Group

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]


@dataclass(frozen=True)
class TrainerState:
    """The fields of ``transformers.TrainerState`` that reward functions can read."""

    global_step: int
    """Optimizer steps done."""


def load_function(path: str) -> RewardFunction:
    """Import a reward function by its dotted path, such as ``my_rewards.short_reasoning``.

    Modules in the working directory are found too, after installed ones. The first import of a module is announced
    on standard error with its file, since it runs code that a setting names.

    Raises:
        ValueError: the path is not dotted, the module or the name does not exist, or the object cannot be called with
            TRL's signature. Errors inside the module propagate unchanged.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(
            f"The reward function {shown(path)} is not a dotted path: write it as package.module.function, "
            "for example my_rewards.short_reasoning."
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    _announce(path, module_name.partition(".")[0])
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # something that the user's module imports is missing
        raise ValueError(
            f"The reward function {shown(path)} cannot be loaded because there is no module {shown(error.name)}: "
            "install it, or start from the folder that contains it."
        ) from error
    if name not in vars(module):
        raise ValueError(
            f"The reward function {shown(path)} cannot be loaded: module {shown(module_name)} has no {shown(name)}."
        )
    function: RewardFunction = vars(module)[name]
    check_signature(path, function)
    return function


def _announce(path: str, package: str) -> None:
    """Say which file is about to run, unless its module is loaded already. A package is named by its ``__init__``,
    which runs first."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is not None:
        file = spec.origin or ", ".join(spec.submodule_search_locations or ())
        to_stderr(f"Importing Python from the settings: {path} runs {printable(file, 400)}")


def check_signature(path: str, function: object) -> None:
    what = "a function (prompts, completions, completion_ids, **kwargs) that returns one float or None per completion"
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"The reward {shown(path)} is a {type(function).__name__}, but it must be {what}.")
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"The reward function {shown(path)} does not take **kwargs, but it must be {what}: "
            "add **kwargs to its parameters, since it receives more columns than it names."
        )


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


_IMAGE_COLUMNS = ("image", "images")
"""Columns of the data that hold images; functions that name ``images`` get them decoded."""


def _columns(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The columns of the data as TRL passes them, one value per completion; None where a sample lacks a column.

    ``solution``, TRL's usual name, is the gold answer unless the data has a column of that name.
    """
    samples = [group.sample for group in groups for _ in group.completions]
    named = [{**sample.groups, **sample.columns} for sample in samples]
    own = sorted({name for columns in named for name in columns}.difference(_IMAGE_COLUMNS))
    return {
        "solution": [sample.answer for sample in samples],
        "reasoning": [sample.reasoning for sample in samples],
        "description": [sample.description for sample in samples],
        **{name: [columns.get(name) for columns in named] for name in own},
        "answer": [sample.answer for sample in samples],
        "answers": [list(sample.answers) for sample in samples],
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


def call_functions(
    functions: Mapping[str, RewardFunction], groups: Sequence[Group], *, step: int, log: RewardLog
) -> dict[str, list[float | None]]:
    """Score completions with the user's functions, called as TRL calls them.

    A function gets lists with one entry per completion, prompt by prompt: ``prompts`` (chat messages),
    ``completions`` (``[{"role": "assistant", "content": text}]``), ``completion_ids`` (token ids), the columns of the
    data (the sample's fields ``question answer answers answer_text answer_type options reasoning description id
    image_key groups``, each of its groups by name, ``solution``, and every other column of the user's table), and
    ``images`` (decoded) if it names that parameter; further ``log_extra(column, values)``,
    ``log_metric(name, value)`` and ``trainer_state`` (with ``global_step``). Columns of the table that have the name
    of another argument are not passed.

    Args:
        functions: by dotted path. Asynchronous ones run after the others, concurrently in one event loop.

    Returns:
        By path: (B,) rewards; None where the function does not apply, NaN (unscored) where it returned a number that
        is not finite.

    Raises:
        ValueError: a function did not return one float or None per completion; the message names it. Exceptions
            raised by a function propagate with a note that names it.
    """

    def log_metric(name: str, value: float) -> None:
        log.metrics.setdefault(name, []).append(float(value))

    def log_extra(column: str, values: Sequence[Any]) -> None:
        log.columns[column] = list(values)

    completions = [completion for group in groups for completion in group.completions]
    arguments: dict[str, Any] = {
        **_columns(groups),
        "prompts": [
            render_prompt(group.sample, group.template, group.wording).messages
            for group in groups
            for _ in group.completions
        ],
        "completions": [[{"role": "assistant", "content": completion.text}] for completion in completions],
        "completion_ids": [list(completion.token_ids) for completion in completions],
        "log_extra": log_extra,
        "log_metric": log_metric,
        "trainer_state": TrainerState(step),
    }
    images: dict[str, Any] = {}
    names_images = {path for path, function in functions.items() if "images" in inspect.signature(function).parameters}
    if names_images:
        decoded = [[image.load() for image in group.sample.images] for group in groups]
        images["images"] = [loaded for loaded, group in zip(decoded, groups) for _ in group.completions]

    def call(path: str) -> Any:
        return functions[path](**arguments, **(images if path in names_images else {}))

    async def wait_for(path: str) -> Any:
        with _named_errors(path, step):
            return await call(path)

    async def wait_for_all(paths: Sequence[str]) -> list[Any]:
        return await asyncio.gather(*map(wait_for, paths))

    returned = {}
    waiting = [path for path, function in functions.items() if _is_async(function)]
    for path in functions:
        if path not in waiting:
            with _named_errors(path, step):
                returned[path] = call(path)
            _check_logged(path, log, len(completions))
    if waiting:
        with ThreadPoolExecutor(1) as pool:  # a notebook already runs an event loop in this thread
            returned |= zip(waiting, pool.submit(asyncio.run, wait_for_all(waiting)).result())
        _check_logged(", ".join(waiting), log, len(completions))
    return {path: _as_rewards(path, returned[path], len(completions)) for path in functions}


@contextmanager
def _named_errors(path: str, step: int) -> Iterator[None]:
    """Add a note that names the function and its line to the exceptions that it raises.

    Args:
        step: counted from 0.
    """
    try:
        yield
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        where = f" ({os.path.basename(own[0].filename)}, line {own[0].lineno})" if own else ""
        error.add_note(f"This was raised by the reward function {shown(path)}{where} in step {step + 1}.")
        raise


def _check_logged(path: str, log: RewardLog, count: int) -> None:
    for column, values in log.columns.items():
        if len(values) != count:
            raise ValueError(
                f"The reward function {shown(path)} logged {len(values)} values as {shown(column)} for {count} "
                "completions, but "
                "log_extra needs one per completion."
            )


def _as_rewards(path: str, returned: object, count: int) -> list[float | None]:
    """Check a user function's return value."""
    if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes, Mapping)):
        raise ValueError(
            f"The reward function {shown(path)} returned a {type(returned).__name__}, but it must return a list with "
            "one float or None per completion."
        )
    values = list(returned)
    if len(values) != count:
        raise ValueError(
            f"The reward function {shown(path)} returned {number_of(len(values), 'reward')} for "
            f"{number_of(count, 'completion')}, but it must return exactly one float or None for each."
        )
    rewards: list[float | None] = []
    for index, reward in enumerate(values):
        if reward is not None and not isinstance(reward, SupportsFloat):
            raise ValueError(
                f"The reward function {shown(path)} returned {shown(reward)} for completion {index}, but a "
                "reward is a float, "
                "or None where it does not apply."
            )
        number = None if reward is None else float(reward)
        rewards.append(math.nan if number is not None and not math.isfinite(number) else number)
    return rewards
