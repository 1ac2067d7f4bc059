"""Diversity prompting: draw each prompt's template by weight. Imports no torch.

Training prompts use several templates (explanation required, short answer, open-ended, multiple choice), as RARL
reports (arXiv 2506.06600, which publishes neither texts nor weights). All completions of a group answer the same
prompt, so rewards are only compared within a template.
"""

from __future__ import annotations

from medvqa_rl.config import PromptConfig
from medvqa_rl.core.prompts import fits
from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.types import Sample, Template


def template_for(sample: Sample, config: PromptConfig, *, seed: int, step: int, occurrence: int) -> Template:
    """Draw a sample's template by weight, among those that fit the question.

    A pure function of (seed, step, sample id, occurrence), the question and the options. It does not depend on the
    gold answer or the rank.

    Args:
        sample: the sample as stored in the data set.
        config: template weights, and the default template if there are no weights or none of them fits.
        seed: the run's seed.
        step: counted from 0.
        occurrence: distinguishes repeated draws of a sample within a step.
    """
    weights = {template: weight for template, weight in config.mix.weights.items() if fits(sample, template)}
    if not weights:
        return config.template
    remaining = Draws("template", seed, step, sample.id, occurrence).uniform() * sum(weights.values())
    for template, weight in weights.items():
        remaining -= weight
        if remaining < 0:
            return template
    return template
