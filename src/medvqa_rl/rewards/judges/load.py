"""From settings to a judge that is ready, or a sentence that says why there is none. Imports torch only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from medvqa_rl.config import Config, JudgeConfig, RewardsConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.keys import read_key
from medvqa_rl.rewards.judges.cache import CachedGrader, CachedJudge
from medvqa_rl.rewards.judges.embedded_grader import EmbeddedGrader
from medvqa_rl.rewards.judges.endpoint import Endpoint, EndpointGrader, EndpointJudge, host_of
from medvqa_rl.rewards.judges.prompts import PHANTOM
from medvqa_rl.rewards.judges.protocol import Judge, JudgeIdentity
from medvqa_rl.rewards.judges.rubric import CORRECTNESS, REASONING, Grader, Rubric


class Judges(NamedTuple):
    """One model in all the parts that it is asked to play."""

    coherence: Judge | None
    """Says Yes or No to reasoning; None where that was not asked for."""
    graders: Mapping[str, Grader]
    """By the rubric's name."""

    @property
    def identities(self) -> dict[str, JudgeIdentity]:
        """As ``judge.json`` names those that reward."""
        own = {} if self.coherence is None else {"reward": self.coherence.identity}
        return own | {name: grader.identity for name, grader in self.graders.items()}


def load_judges(config: JudgeConfig, *, coherence: bool, rubrics: Sequence[Rubric] = ()) -> Judges:
    """The judge that the settings name, with its cache; a model on this machine is loaded once.

    An endpoint is asked once for each part, a local judge's vocabulary is checked and a grader grades once, so that
    what cannot work fails here.

    Args:
        config: the judge.
        coherence: whether it says Yes or No to reasoning.
        rubrics: on which it grades.

    Raises:
        ValueError: its key is missing, or it cannot be loaded or reached, or cannot answer in the form it must.
        OSError: the cache folder cannot be written.
    """
    if not coherence and not rubrics:
        return Judges(None, {})
    folder = cache_folder(config.cache_dir) / "judges"
    judge: Judge | None = None
    graders: dict[str, Grader] = {}
    if config.endpoint is not None:
        key = read_key(config.api_key_env)
        if coherence:
            judge = asked = EndpointJudge(Endpoint(config, key))
            asked.check()
        for rubric in rubrics:
            graders[rubric.name] = grader = EndpointGrader(Endpoint(config, key), rubric)
            grader.check()
    else:
        from medvqa_rl.rewards.judges.local import load_local_judge

        judge = local = load_local_judge(config)
        if local.prompt is PHANTOM:
            # What it grades by are its verdicts, and those are kept.
            judge = CachedJudge(local, folder) if config.cache else local
            embedded = EmbeddedGrader(judge)
            for rubric in rubrics:
                if rubric is not REASONING:
                    raise ValueError(
                        f"The judge {config.model!r} reads reasoning alone, so it cannot grade {rubric.name}: set "
                        "judge.model to a chat or instruct model, or to an endpoint's."
                    )
            return Judges(judge if coherence else None, {rubric.name: embedded for rubric in rubrics})
        from medvqa_rl.rewards.judges.local_grader import LocalGrader

        for rubric in rubrics:
            graders[rubric.name] = writer = LocalGrader(local, rubric)
            writer.check()
    if config.cache:
        judge = CachedJudge(judge, folder) if judge is not None and coherence else None
        graders = {name: CachedGrader(grader, folder) for name, grader in graders.items()}
    return Judges(judge if coherence else None, graders)


def load_judge(config: JudgeConfig) -> Judge:
    """The judge that the settings name, asked whether reasoning is coherent (:func:`load_judges`).

    Raises:
        ValueError: its key is missing, or it cannot be loaded or reached, or cannot answer Yes and No.
        OSError: the cache folder cannot be written.
    """
    judge = load_judges(config, coherence=True).coherence
    assert judge is not None
    return judge


def load_rewarding(config: Config) -> Judges:
    """The judge of the rewards in all the parts that their weights ask for.

    Raises:
        ValueError: its key is missing, or it cannot be loaded or reached, or cannot answer in the form it must.
        OSError: the cache folder cannot be written.
    """
    return load_judges(config.judge, coherence=config.rewards.semantic > 0, rubrics=rubrics_of(config.rewards))


def rubrics_of(rewards: RewardsConfig) -> list[Rubric]:
    """On which the judge of the rewards grades."""
    found = [REASONING] if rewards.reasoning else []
    is_used = rewards.correctness > 0 or rewards.reasoning > 0
    return [*found, CORRECTNESS] if rewards.open_correctness == "judge" and is_used else found


def notices(config: Config, *, rewards: bool = True) -> list[str]:
    """What a user should know about the judges of a configuration before anything starts: where texts are sent, and
    whether the judge that rewards is also the one that evaluates.

    Args:
        rewards: whether the verb rewards at all; supervision and evaluation do not.
    """
    rubrics = rubrics_of(config.rewards)
    rewarding = config.judge if config.rewards.semantic or rubrics else None
    used = {"judge": rewarding if rewards else None, "eval_judge": config.eval_judge}
    shown = (
        {"judge": "questions, options, answers, reference answers, reasoning and descriptions of images"}
        if rubrics
        else {}
    )
    lines = [
        f"Notice: {shown.get(name, 'questions, options and reasoning')} are sent to {host_of(judge.endpoint)} "
        f"({name}.endpoint), images are not."
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


def overlap(rewarding: JudgeIdentity, evaluating: JudgeIdentity) -> str | None:
    """A warning where a judge evaluates a model that it rewarded, recognised by its weights whatever its name."""
    if rewarding.fingerprint != evaluating.fingerprint:
        return None
    return (
        f"Warning: {evaluating.name} evaluates a model that it rewarded in training (as {rewarding.name}), so the "
        "evaluation shows how well it was pleased, not how good the reasoning is: evaluate with another judge."
    )
