"""Load the judges named in the settings, or raise a message that says why they cannot be used. Imports torch only for
local judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from medvqa_rl.config import Config, JudgeConfig, RewardsConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.network import read_key
from medvqa_rl.core.progress import waiting
from medvqa_rl.rewards.judges.cache import CachedJudge
from medvqa_rl.rewards.judges.embedded import EmbeddedJudge
from medvqa_rl.rewards.judges.endpoint import EndpointJudge, host_of
from medvqa_rl.rewards.judges.prompts import PHANTOM
from medvqa_rl.rewards.judges.protocol import Judge, JudgeIdentity
from medvqa_rl.rewards.judges.rubric import COHERENCE, CORRECTNESS, REASONING, Rubric


def load_judges(
    config: JudgeConfig, rubrics: Sequence[Rubric], *, say: Callable[[str], None] = print
) -> dict[str, Judge]:
    """Load a judge for each rubric, with its cache; they share one local model.

    To fail early, an endpoint grades one request per rubric, and a local model's vocabulary is checked for Yes and No
    or the levels.

    Args:
        say: told what a user should know about an endpoint that works otherwise than asked.

    Returns:
        Judges by the rubric's name.

    Raises:
        ValueError: the key is missing, the judge cannot be loaded or reached, or it cannot reply in the required
            format.
        OSError: the cache folder cannot be written.
    """
    folder = caches_folder(config)

    def cached(judge: Judge, rubric: Rubric) -> Judge:
        return CachedJudge(judge, rubric, folder) if config.cache else judge

    if not rubrics:
        return {}
    judges: dict[str, Judge] = {}
    if config.endpoint is not None:
        key = read_key(config.api_key_env)
        for rubric in rubrics:
            remote = EndpointJudge(config, key, rubric)
            remote.check(say)
            judges[rubric.name] = cached(remote, rubric)
        return judges
    from medvqa_rl.rewards.judges.local import LevelJudge, YesNoJudge
    from medvqa_rl.rewards.judges.local_model import load_judge_model

    with waiting(f"loading the judge {config.model}"):
        loaded = load_judge_model(config)
    for rubric in rubrics:
        if rubric is COHERENCE:
            judges[rubric.name] = cached(YesNoJudge(loaded, strictness=config.strictness), rubric)
        elif loaded.prompt is not PHANTOM:
            judges[rubric.name] = cached(LevelJudge(loaded, rubric), rubric)
        elif rubric is REASONING:
            coherence = cached(YesNoJudge(loaded, strictness=config.strictness), COHERENCE)
            judges[rubric.name] = EmbeddedJudge(judges.get(COHERENCE.name, coherence))
        else:
            raise ValueError(
                f"The judge {config.model!r} only reads reasoning, so it cannot grade {rubric.name}: set judge.model "
                "to a chat or instruct model, or to an endpoint's."
            )
    return judges


def caches_folder(config: JudgeConfig) -> Path:
    """The folder of the caches and calibrations of all judges."""
    return cache_folder(config.cache_dir) / "judges"


def load_judge(config: JudgeConfig) -> Judge:
    """Load the judge of coherence (:func:`load_judges`)."""
    return load_judges(config, [COHERENCE])[COHERENCE.name]


def load_rewarding(config: Config, say: Callable[[str], None] = print) -> dict[str, Judge]:
    """Load the judges that the reward weights need (:func:`load_judges`)."""
    return load_judges(config.judge, rubrics_of(config.rewards), say=say)


def rubrics_of(rewards: RewardsConfig) -> list[Rubric]:
    """The rubrics on which the rewards are judged."""
    grades_answers = rewards.open_correctness == "judge" and (rewards.correctness > 0 or rewards.reasoning > 0)
    needs_coherence = rewards.semantic > 0 or rewards.composite > 0
    needed = {COHERENCE: needs_coherence, REASONING: rewards.reasoning > 0, CORRECTNESS: grades_answers}
    return [rubric for rubric, is_needed in needed.items() if is_needed]


def roles(judges: Mapping[str, Judge]) -> dict[str, JudgeIdentity]:
    """Who rewards, under the names used in ``judge.json``: ``reward`` for coherence, else the rubric's name."""
    return {"reward" if name == COHERENCE.name else name: judge.identity for name, judge in judges.items()}


def notices(config: Config, *, rewards: bool = True) -> list[str]:
    """What a user should know about the configured judges beforehand: where texts are sent, and whether the judge that
    rewards also evaluates.

    Args:
        rewards: whether the command uses rewards; SFT and evaluation do not.
    """
    rubrics = rubrics_of(config.rewards)
    used = {"judge": config.judge if rubrics and rewards else None, "eval_judge": config.eval_judge}
    shown = {"judge": "questions, options and reasoning", "eval_judge": "questions, options and reasoning"}
    if any(rubric is not COHERENCE for rubric in rubrics):
        shown["judge"] = "questions, options, answers, reference answers, reasoning and descriptions of images"
    lines = [
        f"Notice: {shown[name]} are sent to {host_of(judge.endpoint)} ({name}.endpoint), images are not."
        for name, judge in used.items()
        if judge is not None and judge.endpoint is not None
    ]
    if rubrics and config.eval_judge is not None and _who(config.judge) == _who(config.eval_judge):
        lines.append(
            f"Warning: the judge {config.judge.model} both rewards and evaluates, so the evaluation measures how well "
            "it was pleased, not how good the reasoning is: set eval_judge.model to another model."
        )
    return lines


def _who(config: JudgeConfig) -> tuple[str, str | None, str | None]:
    return config.model, config.revision, config.endpoint


def overlap(rewarding: JudgeIdentity, evaluating: JudgeIdentity) -> str | None:
    """A warning if a judge evaluates a model that it rewarded, recognised by its weights whatever its name."""
    if rewarding.fingerprint != evaluating.fingerprint:
        return None
    return (
        f"Warning: {evaluating.name} evaluates a model that it rewarded in training (as {rewarding.name}), so the "
        "evaluation measures how well it was pleased, not how good the reasoning is: evaluate with another judge."
    )
