"""Judges as instruments of an evaluation, and the judges that rewarded the evaluated model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medvqa_rl.config import JudgeConfig
from medvqa_rl.core.files import read_json
from medvqa_rl.evaluation.measures.instruments import NamedJudge
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.rewards.judges import Judge, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.load import load_judge

_IDENTITIES = TypeAdapter(dict[str, JudgeIdentity])


def judge_request(record: EvalRecord) -> JudgeRequest:
    """The case that a judge grades: question, options and gold answer, the model's output, and the data set's
    description of the image."""
    return JudgeRequest(
        record.question,
        record.options,
        record.think or "",
        record.answer or "",
        record.reference,
        record.description,
    )


def load_eval_judge(config: JudgeConfig | None) -> Judge | None:
    """Load the judge of evaluations; returns None if the settings name none.

    Raises:
        ValueError: it cannot be used; the message calls its settings ``eval_judge``.
    """
    if config is None:
        return None
    try:
        return load_judge(config)
    except ValueError as error:
        raise ValueError(str(error).replace("judge.", "eval_judge.").replace("eval_eval_", "eval_")) from error


def as_instrument(judge: Judge | None) -> NamedJudge | None:
    """Wrap a judge of coherence as an instrument of the thinking reward. Its name includes prompt and weights, so that
    verdicts of judges that differ in either are never averaged."""
    if judge is None:
        return None

    def verdicts(records: Sequence[EvalRecord]) -> list[float]:
        return [grade.score for grade in judge.grade([judge_request(record) for record in records])]

    return NamedJudge(f"{judge.identity.name} {judge.identity.key}", verdicts)


def rewarding_judges(checkpoint: Path | None) -> dict[str, JudgeIdentity]:
    """The judges that rewarded a run's checkpoint, from its ``judge.json``: ``reward`` for coherence, ``reasoning``
    and ``correctness`` for the rubrics. Empty for folders outside a run.

    Raises:
        ValueError: the file is damaged.
    """
    if checkpoint is None:
        return {}
    for folder in (checkpoint.parent, checkpoint.parent.parent):  # best, or checkpoints/step_000100
        path = folder / "judge.json"
        if path.is_file():
            return _without_evaluation(read_json(_IDENTITIES, path, "restore it, or remove it"))
    return {}


def read_identities(results: Mapping[str, Any]) -> dict[str, JudgeIdentity]:
    """The judges that rewarded the evaluated model, by role, from a results.json that was checked."""
    return _without_evaluation(_IDENTITIES.validate_python(results.get("judges", {})))


def _without_evaluation(stored: dict[str, JudgeIdentity]) -> dict[str, JudgeIdentity]:
    return {role: identity for role, identity in stored.items() if role != "evaluation"}
