"""Load the judges named in the settings, or raise a message that says why they cannot be used. Imports torch only for
local judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from medvqa_rl.config import Config, JudgeConfig, RewardsConfig
from medvqa_rl.config.problems.judge import EMBEDDED_SEEING
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.network import read_key
from medvqa_rl.core.progress import waiting
from medvqa_rl.rewards.judges.cache import CachedJudge
from medvqa_rl.rewards.judges.embedded import EmbeddedJudge
from medvqa_rl.rewards.judges.endpoint import EndpointJudge, host_of
from medvqa_rl.rewards.judges.prompts import PHANTOM
from medvqa_rl.rewards.judges.protocol import Judge, JudgeIdentity
from medvqa_rl.rewards.judges.rubric import COHERENCE, CORRECTNESS, REASONING, STEP, Rubric, seeing


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
    shown = [seeing(rubric, config.sees) for rubric in rubrics]
    judges: dict[str, Judge] = {}
    if config.endpoint is not None:
        key = read_key(config.api_key_env)
        for rubric in shown:
            remote = EndpointJudge(config, key, rubric)
            remote.check(say)
            judges[rubric.name] = cached(remote, rubric)
        return judges
    judge, is_embedded = _local(config)
    for rubric in shown:
        if rubric.is_yes_no or not is_embedded:
            judges[rubric.name] = cached(judge(rubric), rubric)
        elif rubric.name == REASONING.name:
            coherence = seeing(COHERENCE, config.sees)
            judges[rubric.name] = EmbeddedJudge(judges.get(COHERENCE.name) or cached(judge(coherence), coherence))
        else:
            raise ValueError(
                f"The judge {config.model!r} only judges reasoning, so it cannot grade {rubric.name}: set judge.model "
                "to a chat or instruct model, or to an endpoint's."
            )
    return judges


def _local(config: JudgeConfig) -> tuple[Callable[[Rubric], Judge], bool]:
    """Makes judges on this machine, which share a model, for any rubric; and whether it is an embedded one."""
    from medvqa_rl.rewards.judges.local import LevelJudge, YesNoJudge
    from medvqa_rl.rewards.judges.local_model import folder_of, load_judge_model
    from medvqa_rl.rewards.judges.phantom.judge import DescriptionJudge, SightJudge
    from medvqa_rl.rewards.judges.phantom.sight import load_sight
    from medvqa_rl.rewards.judges.vision import SeeingLevelJudge, SeeingYesNoJudge, load_seeing_model

    def of_text(rubric: Rubric) -> Judge:
        if rubric.is_yes_no:
            return YesNoJudge(loaded, strictness=config.strictness, rubric=rubric)
        return LevelJudge(loaded, rubric)

    def of_images(rubric: Rubric) -> Judge:
        if rubric.is_yes_no:
            return SeeingYesNoJudge(looking, strictness=config.strictness, rubric=rubric)
        return SeeingLevelJudge(looking, rubric)

    with waiting(f"loading the judge {config.model}"):
        if config.model == EMBEDDED_SEEING and config.sees == "description":
            return lambda rubric: DescriptionJudge(config.model, rubric, strictness=config.strictness), True
        if config.model == EMBEDDED_SEEING:
            sight = load_sight(folder_of(config))
            return lambda rubric: SightJudge(config.model, sight, rubric, strictness=config.strictness), True
        if config.sees == "image":
            looking = load_seeing_model(config)
            return of_images, False
        loaded = load_judge_model(config)
        return of_text, loaded.prompt is PHANTOM


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
    needed = {
        COHERENCE: needs_coherence,
        STEP: rewards.process > 0,
        REASONING: rewards.reasoning > 0,
        CORRECTNESS: grades_answers,
    }
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
    lines = [
        _notice(name, judge, rubrics if name == "judge" else [COHERENCE])
        for name, judge in used.items()
        if judge is not None and judge.endpoint is not None
    ]
    if rubrics and config.eval_judge is not None and _who(config.judge) == _who(config.eval_judge):
        lines.append(
            f"Warning: the judge {config.judge.model} both rewards and evaluates, so the evaluation measures how well "
            "it was pleased, not how good the reasoning is: set eval_judge.model to another model."
        )
    return lines


def _notice(name: str, judge: JudgeConfig, rubrics: Sequence[Rubric]) -> str:
    """Say what is sent to a judge's server."""
    shown = {field for rubric in rubrics for field in seeing(rubric, judge.sees).shows}
    texts = "questions, options and reasoning"
    if "gold" in shown:
        texts = "questions, options, answers, reference answers, reasoning and descriptions of images"
    elif "description" in shown:
        texts = "questions, options, reasoning and descriptions of images"
    images = "and the images with them" if "images" in shown else "images are not"
    return f"Notice: {texts} are sent to {host_of(judge.endpoint or '')} ({name}.endpoint), {images}."


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
