"""The format reward: is the completion exactly a think section and an answer section? Imports no torch."""

from __future__ import annotations

from medvqa_rl.prompts import Template, parse_completion


def score_format(text: str, template: Template = "think_answer") -> float:
    """1 if the completion has the requested form, else 0.

    The form: each of ``<think> </think> <answer> </answer>`` exactly once, in this order, nothing but white space
    outside, both sections non-empty. With the ``direct`` template any non-empty text has the form.
    """
    return float(parse_completion(text, template).is_well_formed)
