"""Rewards that a program gives instead of settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from medvqa_rl.config import Config, ConfigError, RewardsConfig
from medvqa_rl.config.yaml import build_config
from medvqa_rl.core.text import number_of, shown
from medvqa_rl.rewards.functions import RewardFunction, check_signature

Reward = str | RewardFunction
"""The name of one of our parts (``"correctness"``), the dotted path of a function, or a function."""


def with_rewards(
    config: Config, rewards: Reward | Sequence[Reward] | None, weights: Sequence[float] | None = None
) -> tuple[Config, dict[str, RewardFunction]]:
    """Return the settings with these rewards only, and the functions among them by the path that the settings name.

    Args:
        config: the settings; without rewards they stay as they are.
        rewards: names of our parts, dotted paths or functions.
        weights: one for each; 1 by default.

    Raises:
        ValueError: a reward is unknown, no function with TRL's signature, or given twice.
    """
    if rewards is None:
        if weights is not None:
            raise ConfigError(["reward_weights is given without reward_funcs: give both, or set them in rewards."])
        return config, {}
    listed = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    if len(weights := [1.0] * len(listed) if weights is None else list(weights)) != len(listed):
        raise ConfigError(
            [f"There are {len(weights)} reward_weights for {number_of(len(listed), 'reward')}: give one for each."]
        )
    parts = dict.fromkeys(RewardsConfig().weights, 0.0)
    paths: dict[str, float] = {}
    functions: dict[str, RewardFunction] = {}
    for reward, weight in zip(listed, weights):
        name = reward if isinstance(reward, str) else _path_of(reward)
        chosen = parts if name in parts else paths
        if chosen.get(name):
            raise ConfigError([f"Two of reward_funcs are called {name}: give each function a __name__ of its own."])
        if "." not in name and chosen is paths:
            raise ConfigError([f"There is no reward {shown(name)}: write a function or one of {', '.join(parts)}."])
        chosen[name] = weight
        if not isinstance(reward, str):
            functions[name] = reward
    given = config.rewards.model_dump(mode="json") | parts | {"functions": paths}
    checked = build_config({"rewards": given}, is_whole=False).rewards
    return config.model_copy(update={"rewards": checked}), functions


def _path_of(function: RewardFunction) -> str:
    """The dotted path under which a function is recorded, importable or not."""
    name = getattr(function, "__name__", type(function).__name__)
    module = getattr(function, "__module__", None) or type(function).__module__
    path = ".".join(part for part in (*module.split("."), name.strip("<>")) if part.isidentifier())
    check_signature(path, function)
    return path if "." in path else f"__main__.{path}"
