"""The medical semantic reward: a judge's verdict on the reasoning. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.core.prompts import Template, parse_completion
from medvqa_rl.core.types import Group, Sample
from medvqa_rl.rewards.functions import FunctionLog
from medvqa_rl.rewards.judges.protocol import Judge, JudgeRequest


def judge_request(sample: Sample, text: str, template: Template = "think_answer") -> JudgeRequest:
    """What a judge is shown of a completion: question, options and the text inside the think tags, which is empty
    where they are missing, unclosed or not unique."""
    return JudgeRequest(sample.question, sample.options, parse_completion(text, template).think or "")


def score_semantic(groups: Sequence[Group], judge: Judge, log: FunctionLog) -> NDArray[np.float64]:
    """1 where the judge says that the reasoning is clinically coherent, else 0; NaN (unscored) where it failed.

    A language model reads question, options and reasoning, and says Yes where log P("Yes") > log P("No"); empty
    reasoning is 0. From arXiv 2505.13973, whose judge prompt is not known: ours are in
    :mod:`medvqa_rl.rewards.judges.prompts`.

    Args:
        log: gets, per completion, the margin, why a verdict failed and whose it is; and the judge's counters.

    Returns:
        (B,) values, prompt by prompt.
    """
    requests = [
        judge_request(group.sample, completion.text, group.template)
        for group in groups
        for completion in group.completions
    ]
    verdicts = judge.judge(requests)
    log.columns["judge"] = [str(judge.identity)] * len(verdicts)
    log.columns["judge_margin"] = [None if math.isnan(v.margin) else round(v.margin, 6) for v in verdicts]
    if any(verdict.reason for verdict in verdicts):
        log.columns["judge_failure"] = [verdict.reason for verdict in verdicts]
    for name, total in judge.counters.items():
        log.metrics[f"judge/{name}"] = [float(total)]
    return np.array([verdict.value for verdict in verdicts], dtype=np.float64)
