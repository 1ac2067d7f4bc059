"""The format reward: does the completion have exactly the requested form? Imports no torch."""

from __future__ import annotations

from medvqa_rl.core.prompts import Template, parse_completion


def score_format(text: str, template: Template = "think_answer") -> float:
    """1 if the completion has the requested form, else 0.

    The form: each tag of the template's sections exactly once, in this order, nothing but white space outside, no
    section empty; for most templates ``<think> </think> <answer> </answer>``. With the ``direct`` template any
    non-empty text has the form.
    """
    return float(parse_completion(text, template).is_well_formed)
