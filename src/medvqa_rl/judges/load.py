"""From settings to a judge that is ready, or a sentence that says why there is none. Imports torch only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medvqa_rl.config import Config, JudgeConfig
from medvqa_rl.data.index import cache_folder
from medvqa_rl.judges.cache import CachedJudge
from medvqa_rl.judges.endpoint import EndpointJudge, host_of

if TYPE_CHECKING:
    from medvqa_rl.judges.protocol import Judge, JudgeIdentity


def load_judge(config: JudgeConfig) -> Judge:
    """The judge that the settings name, with its cache.

    An endpoint is asked once, a local judge's vocabulary is checked, so that what cannot work fails here.

    Raises:
        ValueError: it cannot be loaded, reached, or cannot answer Yes and No.
        OSError: the cache folder cannot be written.
    """
    judge: Judge
    if config.endpoint is not None:
        judge = endpoint = EndpointJudge(config)
        endpoint.check()
    else:
        from medvqa_rl.judges.local import load_local_judge

        judge = load_local_judge(config)
    return CachedJudge(judge, cache_folder(config.cache_dir) / "judges") if config.cache else judge


def notices(config: Config, *, rewards: bool = True) -> list[str]:
    """What a user should know about the judges of a configuration before anything starts: where texts are sent, and
    whether the judge that rewards is also the one that evaluates.

    Args:
        rewards: whether the verb rewards at all; supervision and evaluation do not.
    """
    rewarding = config.judge if config.rewards.semantic else None
    used = {"judge": rewarding if rewards else None, "eval_judge": config.eval_judge}
    lines = [
        f"Notice: questions, options and reasoning are sent to {host_of(judge.endpoint)} ({name}.endpoint), images "
        "are not."
        for name, judge in used.items()
        if judge is not None and judge.endpoint is not None
    ]
    if rewarding is not None and config.eval_judge is not None and _who(rewarding) == _who(config.eval_judge):
        lines.append(
            f"Warning: the judge {rewarding.model} both rewards and evaluates, so its evaluation shows how well it "
            "was pleased, not how good the reasoning is: set eval_judge.model to another."
        )
    return lines


def _who(config: JudgeConfig) -> tuple[str, str | None, str | None]:
    return config.model, config.revision, config.endpoint


def overlap(rewarding: JudgeIdentity | None, evaluating: JudgeIdentity) -> str | None:
    """A warning where a judge evaluates a model that it rewarded, recognised by its weights whatever its name."""
    if rewarding is None or rewarding.fingerprint != evaluating.fingerprint:
        return None
    return (
        f"Warning: {evaluating.name} evaluates a model that it rewarded in training (as {rewarding.name}), so the "
        "evaluation shows how well it was pleased, not how good the reasoning is: evaluate with another judge."
    )
