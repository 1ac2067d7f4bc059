"""The one scorer: tables of answers, and gold scores 1.

Run: pytest tests/core/test_answers.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.core.answers import is_correct, parse_completion, score_correctness
from medvqa_rl.core.prompts import TAGS, render_answer
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import LETTERS, AnswerType, Sample

OPTIONS = ("pleural effusion", "no finding", "mass", "mass")


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("B", True),
        ("(b)", True),
        ("B: no finding", True),
        ("No finding.", True),
        ("A", False),
        ("A: no finding", False),
        ("B: pleural effusion", False),
        ("B or C", False),
        ("nothing", False),
        (None, False),
    ],
)
def test_choice(answer: str | None, correct: bool) -> None:
    assert is_correct(Sample("q", "?", "B", "choice", options=OPTIONS), answer) is correct


@pytest.mark.parametrize("answer_type", ["closed", "open"])
@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("no", "No.", True),
        ("no", "abnormal", False),
        ("no", "not seen", False),
        ("no", "unknown", False),
        ("yes", "yes, abnormal", False),
        ("Yes ", "yes", True),
        ("4", "four", True),
        ("the left lung", "Left lung", True),
        ("left lung", "lung", False),
        ("left lung", "left lung base", False),
        ("?", "?", True),
        ("?", "!", False),
        ("?", "yes", False),
        ("a", "A", True),
        ("yes", None, False),
    ],
)
def test_text(answer_type: AnswerType, gold: str, answer: str | None, correct: bool) -> None:
    assert is_correct(Sample("q", "?", gold, answer_type), answer) is correct


TEXT = st.lists(
    st.one_of(st.sampled_from([*TAGS, "<|im_end|>", "a", "?"]), st.text(st.characters(exclude_categories=["Cs"]))),
    max_size=6,
).map("".join)


@given(TEXT.filter(lambda text: text.strip()), st.sampled_from(["closed", "open"]), st.sampled_from(["direct", "x"]))
def test_any_gold_text_in_the_requested_form_scores_1(gold: str, answer_type: AnswerType, form: str) -> None:
    template = "direct" if form == "direct" else "think_answer"
    text = render_answer("why", gold, template)
    assert score_correctness(Sample("q", "?", gold, answer_type), text, template) == 1.0
    assert parse_completion(text, template).is_well_formed


@given(st.lists(TEXT, min_size=1, max_size=26).map(tuple), st.data())
def test_any_gold_letter_scores_1_and_every_other_letter_0(options: tuple[str, ...], data: st.DataObject) -> None:
    gold = data.draw(st.sampled_from(LETTERS[: len(options)]))
    sample = Sample("q", "?", gold, "choice", options=options)
    texts = {normalise(option).upper() for option in options}
    for letter in LETTERS:
        # A letter beyond the options that is itself an option's text, as answers are compared, names that option.
        if letter in LETTERS[: len(options)] or letter not in texts:
            assert score_correctness(sample, render_answer("why", letter)) == float(letter == gold)


def test_a_letter_beyond_the_options_can_be_the_text_of_one() -> None:
    assert is_correct(Sample("q", "?", "A", "choice", options=("B[",)), "B")
    assert not is_correct(Sample("q", "?", "A", "choice", options=("B[", "c")), "B")


def test_an_answer_counts_even_if_the_form_is_broken() -> None:
    sample = Sample("q", "?", "yes", "closed")
    text = "Surely <answer>yes</answer>"
    assert score_correctness(sample, text) == 1.0 and not parse_completion(text).is_well_formed
    assert score_correctness(sample, "<think>so</think>yes") == 0.0
    assert score_correctness(sample, "<answer>yes</answer><answer>yes</answer>") == 0.0
