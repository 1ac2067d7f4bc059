"""The one scorer of answers, used as a reward and by the evaluation, so that they cannot disagree. No torch."""

from __future__ import annotations

from collections import Counter

from medvqa_rl.core.prompts import Template, as_asked, normalise, parse_completion, read_choice
from medvqa_rl.core.types import Sample


def is_correct(sample: Sample, answer: str | None) -> bool:
    """Whether an answer, as :func:`medvqa_rl.core.prompts.parse_completion` read it, is the sample's gold answer.

    Choice questions: the answer names the gold option, by letter or by its text (:func:`read_choice`). Closed and
    open questions: both are equal after :func:`normalise`, whole and never as a substring; where normalising leaves
    nothing of the gold answer ("?"), both are equal as written.

    Args:
        sample: the question with its gold answer.
        answer: text of the answer section; None (no answer) is wrong.
    """
    if answer is None:
        return False
    if sample.answer_type == "choice":
        return read_choice(answer, sample.options) == sample.answer
    gold = normalise(sample.answer)
    return normalise(answer) == gold if gold else answer.strip() == sample.answer.strip()


def score_correctness(sample: Sample, text: str, template: Template = "think_answer") -> float:
    """1 if the completion's answer is correct, else 0; a completion without a readable answer gets 0."""
    return float(is_correct(as_asked(sample, template), parse_completion(text, template).answer))


def token_f1(prediction: str | None, gold: str) -> float:
    """Overlap of the words of two answers: F1 = 2 * precision * recall / (precision + recall).

    Words are those of the normalised texts, counted with multiplicity (SQuAD, Rajpurkar et al. 2016, with this
    package's normalisation). Two texts without words are equal (1); one without words, or no answer at all, gets 0.
    """
    if prediction is None:
        return 0.0
    words, gold_words = normalise(prediction).split(), normalise(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * shared / (len(words) + len(gold_words))
