"""A judge as an instrument of evaluations, and which judge rewarded the model that is evaluated. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from medvqa_rl.config import JudgeConfig
from medvqa_rl.evaluation.measures.instruments import NamedJudge
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.rewards.judges import Judge, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.load import load_judge


def load_eval_judge(config: JudgeConfig | None) -> Judge | None:
    """The judge of evaluations; None where the settings name none.

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
    """What gives the judged part of the thinking reward. Its name says prompt and weights too, so that verdicts of
    judges that differ in either are never averaged."""
    if judge is None:
        return None

    def verdicts(records: Sequence[EvalRecord]) -> list[float]:
        requests = [JudgeRequest(record.question, record.options, record.think or "") for record in records]
        return [verdict.value for verdict in judge.judge(requests)]

    return NamedJudge(f"{judge.identity.name} {judge.identity.key}", verdicts)


def rewarding_judges(checkpoint: Path | None) -> dict[str, JudgeIdentity]:
    """Who rewarded a checkpoint of a run, by what it was asked (``reward`` is coherence, ``reasoning`` and
    ``correctness`` are rubrics), from the ``judge.json`` of its run; nobody for other folders.

    Raises:
        ValueError: the file is damaged.
    """
    if checkpoint is None:
        return {}
    for folder in (checkpoint.parent, checkpoint.parent.parent):  # best, or checkpoints/step_000100
        path = folder / "judge.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                return {role: JudgeIdentity(**one) for role, one in found.items() if role != "evaluation"}
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"The file {path} is damaged ({error}): restore it, or remove it.") from error
    return {}
