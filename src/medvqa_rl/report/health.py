"""Checks for signs of failed training, each a rule with a threshold and the measured value. Imports no torch.

The four-factor study (arXiv 2505.13973) names four signs: verbose and wrong, low thinking reward with high accuracy,
high perplexity, and a curve that does not rise. The checks for abrupt changes and collapse are ours. The study gives
no thresholds; those here are inferred: exceeding one is a reason to look closer, not a verdict. All values come
from metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal

from medvqa_rl.core.text import number_of
from medvqa_rl.learning.run.collapse import ENTROPY_LEFT, HIGH_KL, REWARD_LEFT, WINDOW, Sign, find_collapses
from medvqa_rl.report.runs import Row
from medvqa_rl.report.stability import abrupt_changes, largest_change, largest_drop, window_for

Verdict = Literal["fine", "look", "not measured"]

WRONG_LONGER = 1.5
"""Ratio of the lengths of wrong and correct completions from which wrong ones are verbose."""
LONGER_NOW = 1.5
"""Growth in length from which accuracy should have risen too."""
HIGH_ACCURACY = 0.6
LOW_THINKING = 0.5
"""Share of the maximum thinking reward below which the reasoning no longer supports the answer."""
HIGH_PERPLEXITY = 30.0
"""About twice what the study reports for its models (13 to 14)."""
RISE = 2.0
"""Standard errors by which the end of a curve must lie above its beginning to have risen."""
BREAK = 3.0
"""Standard deviations between the means of two adjacent windows of a curve."""
LENGTH_LEFT = 0.5
"""Share of the initial value below which length has collapsed."""
MIN_STEPS = 20
"""Minimum number of logged steps for comparing start and end."""

THINKING_PARTS = ("format", "semantic")
"""Reward parts, from 0 to 1 each, whose sum is the thinking reward."""


@dataclass(frozen=True)
class Check:
    """A sign of failure, its rule and the measured value."""

    name: str
    verdict: Verdict
    rule: str
    figure: str


def check_health(rows: Sequence[Row]) -> list[Check]:
    """Run all checks on the lines of a run's metrics.jsonl."""
    return [
        verbose_and_wrong(rows),
        thinking_against_accuracy(rows),
        perplexity(rows),
        no_rise(rows),
        broken_curve(rows),
        reward_to_zero(rows),
        high_kl(rows),
        low_entropy(rows),
        collapse(rows, "completions/mean_length", "Length collapses", "tokens", LENGTH_LEFT),
    ]


def _percent(share: float, decimals: int = 1) -> str:
    return f"{100 * share:.{decimals}f}\u00a0%"


def series(rows: Sequence[Row], name: str) -> list[float]:
    """Return the values of one metric in order."""
    return [row[name] for row in rows if name in row]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and last tenth of a curve with at least ten values."""
    size = len(values) // 10
    return fmean(values[:size]), fmean(values[-size:])


def _too_short(name: str, rule: str, values: Sequence[float], what: str) -> Check | None:
    if len(values) >= MIN_STEPS:
        return None
    found = (
        f"{what} was logged in {number_of(len(values), 'step')}; {MIN_STEPS} are needed."
        if values
        else f"{what} was not logged."
    )
    return Check(name, "not measured", rule, found)


def verbose_and_wrong(rows: Sequence[Row]) -> Check:
    """Length without accuracy, a sign that a length reward is exploited."""
    name = "Verbose and wrong"
    rule = (
        f"In the last tenth of the steps wrong completions are at least {WRONG_LONGER:g} times as long as correct "
        f"ones, or all are at least {LONGER_NOW:g} times as long as in the first tenth while accuracy has not risen."
    )
    accuracy, lengths = series(rows, "rewards/correctness/mean"), series(rows, "completions/mean_length")
    short = _too_short(name, rule, lengths, "the length of completions")
    if short is not None:
        return short
    last = [row for row in rows if "completions/mean_length" in row][-(len(lengths) // 10) :]
    right, wrong = series(last, "completions/mean_length_correct"), series(last, "completions/mean_length_wrong")
    start, end = ends(lengths)
    figures = [f"Length {start:.0f} tokens at the start, {end:.0f} at the end."]
    is_verbose = False
    if right and wrong:
        ratio = fmean(wrong) / max(fmean(right), 1.0)
        is_verbose = ratio >= WRONG_LONGER
        figures.append(f"At the end: wrong {fmean(wrong):.0f}, correct {fmean(right):.0f}, ratio {ratio:.2f}.")
    if len(accuracy) >= MIN_STEPS:
        then, now = ends(accuracy)
        is_verbose |= end >= LONGER_NOW * start and now <= then
        figures.append(f"Sampled accuracy {_percent(then)} at the start, {_percent(now)} at the end.")
    return Check(name, "look" if is_verbose else "fine", rule, " ".join(figures))


def thinking_against_accuracy(rows: Sequence[Row]) -> Check:
    """Correct answers with poorly rewarded reasoning: the reasoning does not support the answer."""
    name = "Low thinking reward with high accuracy"
    rule = (
        f"In the last tenth of the steps accuracy is at least {_percent(HIGH_ACCURACY, 0)} while the thinking reward "
        f"({' + '.join(THINKING_PARTS)}, those that are enabled) is below {_percent(LOW_THINKING, 0)} of its "
        "highest value."
    )
    accuracy = series(rows, "rewards/correctness/mean")
    short = _too_short(name, rule, accuracy, "accuracy of samples")
    if short is not None:
        return short
    parts = {part: series(rows, f"rewards/{part}/mean") for part in THINKING_PARTS}
    known = {part: ends(values)[1] for part, values in parts.items() if len(values) >= MIN_STEPS}
    if not known:
        return Check(name, "not measured", rule, "No part of the thinking reward was enabled.")
    now, thinking = ends(accuracy)[1], sum(known.values())
    missing = [part for part in THINKING_PARTS if part not in known]
    note = f" The {' and '.join(missing)} part was not measured." if missing else ""
    is_low = now >= HIGH_ACCURACY and thinking < LOW_THINKING * len(known)
    figure = f"Sampled accuracy {_percent(now)}, thinking reward {thinking:.2f} of {len(known)}.{note}"
    return Check(name, "look" if is_low else "fine", rule, figure)


def perplexity(rows: Sequence[Row]) -> Check:
    """Text that a fixed language model finds unlikely: the policy has lost fluency."""
    name = "High perplexity"
    rule = f"The last evaluation's perplexity under a fixed language model is above {HIGH_PERPLEXITY:g}."
    values = series(rows, "eval/perplexity")
    if not values:
        return Check(name, "not measured", rule, "No evaluation measured perplexity (eval.perplexity_model).")
    verdict: Verdict = "look" if values[-1] > HIGH_PERPLEXITY else "fine"
    return Check(name, verdict, rule, f"Perplexity {values[0]:.1f} at the start, {values[-1]:.1f} at the end.")


def no_rise(rows: Sequence[Row]) -> Check:
    """A reward that has not risen: there was nothing that RL could amplify."""
    name = "No rise of the curve"
    rule = (
        f"The mean reward of the last fifth of the steps is not above that of the first fifth by {RISE:g} standard "
        "errors of their difference."
    )
    values = series(rows, "reward")
    short = _too_short(name, rule, values, "the reward")
    if short is not None:
        return short
    first, last = values[: len(values) // 5], values[-(len(values) // 5) :]
    error = math.sqrt(variance(first) / len(first) + variance(last) / len(last))
    rise = fmean(last) - fmean(first)
    figure = f"Mean reward {fmean(first):.2f} at the start, {fmean(last):.2f} at the end (standard error {error:.2f})."
    return Check(name, "look" if rise <= RISE * error else "fine", rule, figure)


def broken_curve(rows: Sequence[Row]) -> Check:
    """A jump of the reward (in SFT, of the loss) beyond its noise."""
    name = "Abrupt change of the curve"
    metric = "reward" if series(rows, "reward") else "loss"
    values = series(rows, metric)
    window = window_for(len(values))
    rule = (
        f"At some step the mean {metric} of {window} steps differs from that of the previous {window} by more than "
        f"{BREAK:g} standard deviations of the steps within them."
    )
    short = _too_short(name, rule, values, "the reward" if metric == "reward" else "the loss")
    if short is not None:
        return short
    steps = [row["step"] for row in rows if metric in row]
    worst = largest_change(steps, values, window)
    others = [change for change in abrupt_changes(steps, values, window, BREAK) if change != worst]
    times = (
        "the steps before do not vary"
        if math.isinf(worst.deviations)
        else f"{worst.deviations:.1f} standard deviations"
    )
    figure = f"The largest is {worst.change:+.2f} at step {worst.step:.0f} ({times})."
    if others:
        figure += " Others: " + ", ".join(f"{change.change:+.2f} at step {change.step:.0f}" for change in others) + "."
    if metric == "reward":
        drop = largest_drop(steps, values, window)
        figure += (
            f" The mean of {window} steps fell by {drop.size:.2f} at most, from step {drop.top:.0f} to "
            f"{drop.bottom:.0f}."
            if drop.size > 0
            else f" The mean of {window} steps never fell."
        )
    verdict: Verdict = "look" if worst.deviations > BREAK else "fine"
    return Check(name, verdict, rule, figure.replace("-", "−"))


def collapse(rows: Sequence[Row], metric: str, name: str, unit: str, left: float) -> Check:
    """A curve that has lost most of its initial value."""
    rule = f"The mean of the last tenth of the steps is below {_percent(left, 0)} of that of the first tenth."
    values = series(rows, metric)
    short = _too_short(name, rule, values, metric.rpartition("/")[2].replace("_", " "))
    if short is not None:
        return short
    start, end = ends(values)
    share = f" ({_percent(end / start, 0)})" if start > 0 else ""
    figure = f"{start:.3g} {unit} at the start, {end:.3g} at the end{share}."
    return Check(name, "look" if end < left * start else "fine", rule, figure)


def reward_to_zero(rows: Sequence[Row]) -> Check:
    """A policy that no longer earns anything, or never did."""
    rule = (
        f"At some step the mean reward of {WINDOW} steps is at most {_percent(REWARD_LEFT, 0)} of the highest such "
        "mean before it."
    )
    return _as_watched(rows, "reward", "Reward falls to 0", "", rule)


def high_kl(rows: Sequence[Row]) -> Check:
    """A policy far from its reference: the reward may be exploited, and the text may degrade."""
    rule = f"At some step the median KL divergence of {WINDOW} steps is above {HIGH_KL:g} (nats per token)."
    return _as_watched(rows, "kl", "High KL", " nats per token", rule)


def low_entropy(rows: Sequence[Row]) -> Check:
    """A policy that always says the same."""
    rule = (
        f"At some step the mean entropy of {WINDOW} steps is below {_percent(ENTROPY_LEFT, 0)} of that of the first "
        f"{WINDOW}."
    )
    return _as_watched(rows, "entropy", "Entropy collapses", " nats per token", rule)


def _as_watched(rows: Sequence[Row], sign: Sign, name: str, unit: str, rule: str) -> Check:
    """Check a metric as the run itself does (:mod:`medvqa_rl.learning.run.collapse`)."""
    values = series(rows, sign)
    what = {"reward": "the reward", "kl": "KL", "entropy": "entropy"}[sign]
    short = _too_short(name, rule, values, what)
    if short is not None:
        return short
    found = find_collapses(rows).get(sign)
    start, end = fmean(values[:WINDOW]), fmean(values[-WINDOW:])
    figure = f"{start:.3g} in the first {WINDOW} steps, {end:.3g}{unit} in the last {WINDOW}."
    if found is not None:
        figure += f" First seen at step {found.step}."
    return Check(name, "fine" if found is None else "look", rule, figure)
