"""The parts of the reward and their weighted sum. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.config import RewardsConfig
from medvqa_rl.prompts import Template
from medvqa_rl.rewards.correctness import score_correctness
from medvqa_rl.rewards.format import score_format
from medvqa_rl.rewards.functions import FunctionLog, call_function, load_function
from medvqa_rl.types import Group, Scores


class Rewards:
    """Scores groups of completions with the enabled parts. A part with weight 0 is off: not loaded, not computed."""

    def __init__(self, config: RewardsConfig, template: Template = "think_answer") -> None:
        """Load the user's functions.

        Raises:
            ValueError: no part is enabled, two parts have the same name, or a function cannot be loaded
                (:func:`medvqa_rl.rewards.functions.load_function`).
        """
        self._template = template
        self._weights = {
            name: weight
            for name, weight in (("format", config.format), ("correctness", config.correctness))
            if weight != 0
        }
        self._functions = {}
        for path, weight in config.functions.items():
            if weight == 0:
                continue
            name = path.rpartition(".")[2]
            if name in self._weights:
                raise ValueError(
                    f"Two reward parts are called {name!r} (one is the function {path!r}), but each part is logged "
                    "under its own name: rename the function or set the other's weight to 0."
                )
            self._weights[name] = weight
            self._functions[name] = (path, load_function(path))
        if not self._weights:
            raise ValueError(
                "No reward is enabled, but training needs one: set rewards.format, rewards.correctness or a weight "
                "in rewards.functions to a number other than 0."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the enabled parts, as in ``Scores.parts`` and the logged ``rewards/{name}/mean``."""
        return tuple(self._weights)

    def score(self, groups: Sequence[Group], *, step: int) -> Scores:
        """Score every completion of P groups of G.

        The total is sum(weight * part) over the enabled parts; it is NaN (unscored) where any of them is NaN.

        Args:
            groups: P groups with the same number G of completions.
            step: optimizer steps done, passed on to user functions.

        Returns:
            (P, G) totals and parts.
        """
        sizes = {len(group.completions) for group in groups}
        assert len(sizes) == 1, f"groups have different sizes: {sorted(sizes)}"
        shape = (len(groups), sizes.pop())
        log = FunctionLog({}, {})
        parts = {name: self._part(name, groups, step, log).reshape(shape) for name in self.names}
        total = np.sum([weight * parts[name] for name, weight in self._weights.items()], axis=0)
        extras = {name: float(np.mean(values)) for name, values in log.metrics.items()}
        return Scores(total, parts, extras, log.columns)

    def _part(self, name: str, groups: Sequence[Group], step: int, log: FunctionLog) -> NDArray[np.float64]:
        """(B,) one part before its weight."""
        if name in self._functions:
            path, function = self._functions[name]
            return call_function(path, function, groups, self._template, step=step, log=log)
        pairs = [(group.sample, completion.text) for group in groups for completion in group.completions]
        if name == "format":
            return np.array([score_format(text, self._template) for _, text in pairs])
        return np.array([score_correctness(sample, text, self._template) for sample, text in pairs])
