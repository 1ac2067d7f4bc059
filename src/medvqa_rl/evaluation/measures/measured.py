"""Summaries of what was measured of the outputs: lengths, thinking reward, perplexity, similarity and faithfulness.
Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, variance
from typing import Any

from medvqa_rl.evaluation.measures.metrics import average, rate
from medvqa_rl.evaluation.records import EvalRecord


def perplexity(nlls: Iterable[float], counts: Iterable[int]) -> float:
    """exp(total negative log-likelihood in nats / total tokens); NaN without tokens.

    This is the perplexity of all texts concatenated, not a mean of perplexities, so long texts weigh more.
    """
    total, tokens = math.fsum(nlls), sum(counts)
    return math.exp(total / tokens) if tokens else math.nan


def spread(lengths: Sequence[int]) -> dict[str, Any]:
    """``n``, ``mean`` and ``variance`` (n - 1) of token counts; NaN if there are too few."""
    return {
        "n": len(lengths),
        "mean": fmean(lengths) if lengths else math.nan,
        "variance": float(variance(lengths)) if len(lengths) > 1 else math.nan,
    }


def the_only(names: Iterable[str | None], what: str) -> str | None:
    """Return the only distinct name, or None if all are None.

    Raises:
        ValueError: there are several names, so the numbers are not comparable.
    """
    found = sorted({name for name in names if name is not None})
    if len(found) > 1:
        raise ValueError(
            f"The {what} of these answers was measured by {' and '.join(found)}, which cannot be averaged: evaluate "
            "all answers with one of these."
        )
    return found[0] if found else None


def measured_summary(records: Sequence[EvalRecord]) -> dict[str, Any]:
    """Summarise the measures besides accuracy, over the scored questions.

    Returns:
        ``lengths``: :func:`spread` of ``total`` (tokens of the completion) and ``think`` (of the reasoning), each for
        ``all``, ``right`` and ``wrong`` answers.
        ``thinking``: the thinking reward of arXiv 2505.13973, whose scale is unknown; here from 0 to 2. ``format`` is
        the share of well-formed outputs, ``judged`` the share that the judge finds coherent, ``reward`` the mean of
        their sum over the judged answers, with ``num_judged`` and ``by`` (the judge); without a judge all but
        ``format`` are NaN.
        ``perplexity``: ``value``, the number of ``tokens``, and ``by``, the language model.
        ``similarity``: mean cosine ``value``, also of ``right`` and ``wrong`` answers, ``n`` and ``by``.
        ``faithfulness``: share of true claims, averaged over the reasonings that make claims, their number ``n``,
        the total number of ``claims``, and the mean number of ``distinct_truths`` of all reasonings; PhantomVQA only.

    Raises:
        ValueError: perplexity, similarity or verdicts come from more than one instrument.
    """
    scored = [record for record in records if record.is_scored]
    right, wrong = [r for r in scored if r.is_correct], [r for r in scored if not r.is_correct]
    outcomes = {"all": scored, "right": right, "wrong": wrong}
    judged = [record for record in scored if record.verdict is not None]
    measured = [record for record in scored if record.nll is not None and record.nll_tokens is not None]
    compared = [record for record in scored if record.similarity is not None]
    claiming = [record for record in scored if record.faithfulness is not None]
    return {
        "lengths": {
            "total": {name: spread([r.num_tokens for r in some]) for name, some in outcomes.items()},
            "think": {
                name: spread([r.think_tokens for r in some if r.think_tokens is not None])
                for name, some in outcomes.items()
            },
        },
        "thinking": {
            "format": rate([record.is_well_formed for record in scored]),
            "judged": average(record.verdict for record in judged),
            "reward": average(record.is_well_formed + (record.verdict or 0.0) for record in judged),
            "num_judged": len(judged),
            "by": the_only((record.verdict_by for record in records), "thinking reward"),
        },
        "perplexity": {
            "value": perplexity((r.nll or 0.0 for r in measured), (r.nll_tokens or 0 for r in measured)),
            "tokens": sum(record.nll_tokens or 0 for record in measured),
            "by": the_only((record.perplexity_by for record in records), "perplexity"),
        },
        "similarity": {
            "value": average(record.similarity for record in compared),
            "right": average(record.similarity for record in right),
            "wrong": average(record.similarity for record in wrong),
            "n": len(compared),
            "by": the_only((record.similarity_by for record in records), "similarity"),
        },
        "faithfulness": {
            "value": average(record.faithfulness for record in claiming),
            "right": average(record.faithfulness for record in right),
            "wrong": average(record.faithfulness for record in wrong),
            "n": len(claiming),
            "claims": sum(record.num_claims or 0 for record in claiming),
            "distinct_truths": average(record.distinct_truths for record in scored),
        },
    }
