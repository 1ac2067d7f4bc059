"""Length, repetition, looking and calibration rewards: pure functions of a completion's numbers. Imports no torch."""

from __future__ import annotations

import math

from medvqa_rl.core.text import without_invisible


def extended_chain(num_tokens: int, target: int) -> float:
    """ECR, extended chain reward: min(1, L / L_target), from 0 to 1, whether or not the answer is correct.

    The name is from arXiv 2505.13973; the formula is inferred, since the paper's was not found.

    Args:
        num_tokens: L, tokens of the reasoning as encoded by the policy's tokenizer; 0 if its tags are unclosed.
        target: L_target, the length at which the reward reaches 1.
    """
    return min(1.0, num_tokens / target)


def correctness_weighted_length(num_tokens: int, target: int, *, is_correct: bool) -> float:
    """CWR, correctness-weighted length reward: ECR if the answer is correct, else 0.

    The name is from arXiv 2505.13973; the formula is inferred, since the paper's was not found.
    """
    return extended_chain(num_tokens, target) if is_correct else 0.0


def composite_length(
    num_tokens: int,
    num_statements: int,
    num_distinct: int,
    *,
    length_target: int,
    statements_target: int,
    is_correct: bool,
    coherence: float,
) -> float:
    """Composite length reward, from 0 to 1, for a correct answer whose coherent reasoning is longer *and* says more.

    correct * coherent * min(1, L / L_target, D / D_target) * D / S

    with S statements, of which D are distinct and have L tokens together. The minimum rewards neither length without
    content nor many statements in a few tokens; the last factor takes away the share of statements that repeat
    another, so that a repetition always lowers the reward. arXiv 2505.13973 leaves a length reward that improves
    reasoning as an open question; the formula is ours.

    Args:
        num_tokens: L, tokens of the distinct statements.
        num_statements: S, of the reasoning; 0 if its tags are unclosed.
        num_distinct: D, at most S.
        length_target: L_target.
        statements_target: D_target.
        coherence: the judge's verdict, 1 or 0; NaN (unscored) gives NaN, also for a wrong answer.
    """
    if math.isnan(coherence):
        return math.nan
    if not is_correct or num_statements == 0:
        return 0.0
    longer = min(1.0, num_tokens / length_target, num_distinct / statements_target)
    return coherence * longer * num_distinct / num_statements


def cosine_length(
    length: int,
    limit: int,
    *,
    is_correct: bool,
    is_truncated: bool,
    correct: tuple[float, float],
    wrong: tuple[float, float],
    exceeded: float,
) -> float:
    """Cosine length reward of "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373).

    Interpolates from r_0 at length 0 to r_L at the limit along half a cosine:
    r_L + (r_0 - r_L) / 2 * (1 + cos(pi * length / limit)). With r_0 > r_L, short correct answers are rewarded more;
    with r_0 < r_L, long wrong answers are penalised less.

    Args:
        length: tokens of the completion.
        limit: the token limit.
        is_truncated: whether the completion hit the limit; its reward is ``exceeded`` then.
        correct: r_0 and r_L of correct answers.
        wrong: r_0 and r_L of wrong answers.
        exceeded: reward of a truncated completion.
    """
    if is_truncated:
        return exceeded
    start, end = correct if is_correct else wrong
    return end + (start - end) / 2 * (1 + math.cos(math.pi * length / limit))


def soft_overlong(length: int, limit: int, buffer: float) -> float:
    """Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13): 0 up to limit - buffer, then linearly down
    to -1 at the limit and beyond.

    Args:
        length: tokens of the completion.
        limit: L_max, the token limit.
        buffer: L_cache in tokens, above 0.
    """
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer))


def repetition_penalty(text: str, size: int) -> float:
    """N-gram repetition penalty (arXiv 2502.03373, appendix): minus the share of n-grams that repeat an earlier one,
    -(1 - distinct n-grams / n-grams), from -1 to 0.

    Words are separated by white space and compared in lower case, without invisible characters; a text with fewer
    than ``size`` words gets 0. Unlike in the paper, correct answers are not exempt: repetition is padding in any case.

    Args:
        text: the completion without its tags.
        size: n, words per n-gram.
    """
    words = without_invisible(text).lower().split()
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def looking(gain: float, *, threshold: float, cap: float, is_correct: bool) -> float:
    """Looking reward, from 0 to 1, for a correct answer that needs its image.

    correct * min(1, max(0, (gain - threshold) / (cap - threshold))). The policy itself says how much it needs the
    image; the formula is ours.

    Args:
        gain: log P(completion | image) - log P(completion | another image) under the policy, in nats; NaN (unscored)
            gives NaN.
        threshold: the gain at or below which the reward is 0.
        cap: the gain at or above which the reward is 1; greater than the threshold.
    """
    if math.isnan(gain):
        return math.nan
    return min(1.0, max(0.0, (gain - threshold) / (cap - threshold))) if is_correct else 0.0


def calibration(confidence: float, *, is_correct: bool) -> float:
    """Calibration reward, from 0 to 1: 1 - (confidence - correct)^2, the Brier score turned round.

    Added to the correctness reward with weight 1 it is the reward of RLCR (Damani et al. 2025, arXiv 2507.16806) plus
    1, where the model writes its confidence; here it is the probability of the answer. The square is smallest on
    average at the true share of right answers (a proper scoring rule), so neither under- nor overconfidence is
    rewarded.

    Args:
        confidence: the policy's probability of the answer, 0 to 1; NaN (unscored) gives NaN.
    """
    return 1.0 - (confidence - float(is_correct)) ** 2
