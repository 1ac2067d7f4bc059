"""Diversity prompting: which template asks a question in a step, by weights and by address. Imports no torch.

Training asks in several ways (explanation required, short form, open-ended, multiple choice), as reported of RARL
(arXiv 2506.06600, whose texts and shares are not known). All completions of a group answer the same prompt, so
rewards are compared among them only.
"""

from __future__ import annotations

from medvqa_rl.config import PromptConfig
from medvqa_rl.core.prompts import fits
from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.types import Sample, Template


def template_for(sample: Sample, config: PromptConfig, *, seed: int, step: int, occurrence: int) -> Template:
    """The template that asks a sample's question: of those with a weight that fit it, one by weight.

    A function of its address (seed, step, sample id, occurrence) and of question and options, never of the gold
    answer, the rank, or what was drawn before.

    Args:
        sample: as it is in the data set.
        config: the weights, and the template to ask by where none of them fits or there are none.
        seed: of the run.
        step: of the run.
        occurrence: tells apart the times that a sample occurs in the step.
    """
    weights = {template: weight for template, weight in config.mix.weights.items() if fits(sample, template)}
    if not weights:
        return config.template
    left = Draws("template", seed, step, sample.id, occurrence).uniform() * sum(weights.values())
    for template, weight in weights.items():
        left -= weight
        if left < 0:
            return template
    return template
