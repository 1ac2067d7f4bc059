"""Signs of failure of a trained cell, from its test and its training. Imports no torch.

All four signs named by the study (arXiv 2505.13973) are checked: verbose, repetitive reasoning with a wrong answer; a
low thinking reward with high accuracy; high perplexity; no rise of the reward curve. The study gives no thresholds;
those used here are inferred, and flag a cell for a closer look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.tables import CUT_OFF, WHY_CUT_OFF
from medvqa_rl.report.health import (
    HIGH_ACCURACY,
    HIGH_PERPLEXITY,
    LENGTH_LEFT,
    LONGER_NOW,
    LOW_THINKING,
    WRONG_LONGER,
    Check,
    Verdict,
    broken_curve,
    collapse,
    high_kl,
    low_entropy,
    no_rise,
    verbose_and_wrong,
)
from medvqa_rl.report.runs import Row
from medvqa_rl.rewards.length import repetition_penalty

LESS_FLUENT = 1.5
"""Perplexity of this many times the untrained model's is high, whatever the scale of the language model."""
REPETITION = 4
"""Size, in words, of the n-grams whose repetition is counted."""

Results = Mapping[str, Any]
"""The content of a results.json."""


def cell_signs(
    rows: Sequence[Row], results: Results, records: Sequence[EvalRecord], untrained: Results | None
) -> tuple[Check, ...]:
    """Check a trained cell for all signs.

    Args:
        rows: lines of its metrics.jsonl.
        results: of the primary test.
        records: of the same test.
        untrained: results of the model before training on the same test, if the recipe has them.
    """
    return (
        verbose_on_test(results, records, untrained),
        thinking_on_test(results),
        perplexity_on_test(results, untrained),
        cut_off_on_test(results),
        no_rise(rows),
        replace(verbose_and_wrong(rows), name="Verbose and wrong in training"),
        broken_curve(rows),
        high_kl(rows),
        low_entropy(rows),
        collapse(rows, "completions/mean_length", "Length collapses", "tokens", LENGTH_LEFT),
    )


def _length(results: Results, outcome: str) -> float | None:
    found = results["lengths"]["total"][outcome]["mean"]
    return None if found is None else float(found)


def verbose_on_test(results: Results, records: Sequence[EvalRecord], untrained: Results | None) -> Check:
    """Long completions with a wrong answer, truncated ones included: a length reward is being exploited."""
    name = "Verbose, repetitive and wrong"
    rule = (
        f"Wrong completions are at least {WRONG_LONGER:g} times as long as right ones, or all are at least "
        f"{LONGER_NOW:g} times as long as those of the untrained model while fewer are right."
    )
    right, wrong, every = (_length(results, outcome) for outcome in ("right", "wrong", "all"))
    if every is None:
        return Check(name, "not measured", rule, "No completion was scored.")
    figures = []
    is_verbose = False
    if right is not None and wrong is not None:
        is_verbose = wrong >= WRONG_LONGER * max(right, 1.0)
        figures.append(f"Wrong {wrong:.0f} tokens, right {right:.0f}.")
    before = None if untrained is None else _length(untrained, "all")
    if untrained is not None and before is not None:
        is_verbose |= every >= LONGER_NOW * before and results["accuracy"] < untrained["accuracy"]
        figures.append(
            f"All {every:.0f}, untrained {before:.0f}; accuracy {100 * results['accuracy']:.1f} %, untrained "
            f"{100 * untrained['accuracy']:.1f} %."
        )
    repeated = [-repetition_penalty(r.text, REPETITION) for r in records if r.is_correct is False]
    if repeated:
        figures.append(
            f"Of the {REPETITION}-word sequences in wrong answers {100 * fmean(repeated):.0f} % are repeats."
        )
    return Check(name, "look" if is_verbose else "fine", rule, " ".join(figures))


def thinking_on_test(results: Results) -> Check:
    """Correct answers with poor reasoning."""
    name = "Low thinking reward with high accuracy"
    rule = (
        f"Accuracy is at least {100 * HIGH_ACCURACY:.0f} % while the thinking reward (format and the judge's verdict, "
        f"of 2) is below {2 * LOW_THINKING:g}."
    )
    thinking = results["thinking"]["reward"]
    if thinking is None:
        return Check(name, "not measured", rule, "No evaluation judge (eval_judge) was set.")
    is_low = results["accuracy"] >= HIGH_ACCURACY and thinking < 2 * LOW_THINKING
    figure = f"Accuracy {100 * results['accuracy']:.1f} %, thinking reward {thinking:.2f}."
    return Check(name, "look" if is_low else "fine", rule, figure)


def perplexity_on_test(results: Results, untrained: Results | None) -> Check:
    """Outputs that are unlikely under a fixed language model: the model has lost its fluency."""
    name = "High perplexity"
    rule = (
        f"Perplexity under a fixed language model is above {HIGH_PERPLEXITY:g}, or at least {LESS_FLUENT:g} times "
        "that of the untrained model under the same one."
    )
    value, by = results["perplexity"]["value"], results["perplexity"]["by"]
    if value is None:
        return Check(name, "not measured", rule, "Perplexity was not measured (eval.perplexity_model).")
    figure, is_high = f"Perplexity {value:.1f} under {by}", value > HIGH_PERPLEXITY
    before = None if untrained is None or untrained["perplexity"]["by"] != by else untrained["perplexity"]["value"]
    if before is not None:
        is_high |= value >= LESS_FLUENT * before
        figure += f", {before:.1f} untrained"
    verdict: Verdict = "look" if is_high else "fine"
    return Check(name, verdict, rule, f"{figure}.")


def cut_off_on_test(results: Results) -> Check:
    """Greedy decoding that repeats itself up to the limit: sampled answers of the same model can be fine."""
    name = "Greedy answers cut off"
    rule = (
        f"At least {100 * CUT_OFF:.0f} % of the greedy answers reach the token limit. {WHY_CUT_OFF}: compare with "
        "sampled answers (`medvqa-rl eval --samples 4`)."
    )
    share = results["truncated_rate"]
    figure = f"{100 * share:.1f} % of the answers were cut off."
    return Check(name, "look" if share >= CUT_OFF else "fine", rule, figure)
