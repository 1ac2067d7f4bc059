"""The scorer: tables of answers, and gold answers score 1.

Run: pytest tests/core/test_answers.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.core.answers import is_correct, parse_completion, read_choice, score_correctness, token_f1
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
def test_any_gold_text_in_the_requested_format_scores_1(gold: str, answer_type: AnswerType, form: str) -> None:
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


def test_an_answer_counts_even_if_the_format_is_broken() -> None:
    sample = Sample("q", "?", "yes", "closed")
    text = "Surely <answer>yes</answer>"
    assert score_correctness(sample, text) == 1.0 and not parse_completion(text).is_well_formed
    assert score_correctness(sample, "<think>so</think>yes") == 0.0
    assert score_correctness(sample, "<answer>yes</answer><answer>yes</answer>") == 0.0


LUNGS = ("left lung", "right lung", "heart", "liver")


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "**B**",
            "*B*",
            "`B`",
            "__B__",
            "[B]",
            "{B}",
            '"B"',
            "\u201cB\u201d",
            "\u2018B\u2019",
            "（B）",
            "Ｂ",
            "B。",
            "【B】",
        ),
        *(
            "\\boxed{B}",
            "$B$",
            "$\\boxed{\\text{B}}$",
            "\\boxed{B. right lung}",
            "**B. right lung**",
            "**B**: right lung",
        ),
        *(
            "Option B",
            "option (b)",
            "Choice B.",
            "Answer: B",
            "The answer is B.",
            "The answer is (B).",
            "Final answer: **B**",
        ),
        *("The correct answer is option B", "So the answer is B: right lung", "The answer is right lung."),
        *("right lung (B)", "Right Lung [B].", "right \u00a0 lung", "the right lung", "B\u200b"),
    ],
)
def test_markup_typography_and_lead_ins_around_a_choice(answer: str) -> None:
    assert read_choice(answer, LUNGS) == "B"


@pytest.mark.parametrize(
    "answer",
    [
        *("B and C", "B, C", "B/C", "B or C", "(B) or (C)", "Option B or C", "Answer: B and C", "B: left lung"),
        *("Based on the image", "Both", "E", "Option E", "", "<B", "left or right lung", "The answer", "Answer:"),
        *("left lung (B)", "not B", "The answer is not B", "options B"),
    ],
)
def test_these_name_no_choice(answer: str) -> None:
    assert read_choice(answer, LUNGS) is None


def test_a_letter_that_names_something_is_not_dropped_from_options() -> None:
    hepatitis = tuple(f"Hepatitis {letter}" for letter in "ABCD")
    assert read_choice("hepatitis", hepatitis) is None
    assert read_choice("hepatitis B", hepatitis) == "B"
    vitamins = ("Vitamin A deficiency", "Vitamin deficiency", "Zinc", "Iron")
    assert read_choice("vitamin A deficiency", vitamins) == "A" and read_choice("vitamin deficiency", vitamins) == "B"


def test_an_option_may_begin_like_a_lead_in() -> None:
    options = ("answer", "option B", "choice")
    assert [read_choice(text, options) for text in ("answer", "Option B", "C", "choice")] == ["A", "B", "C", "C"]


def test_token_f1_ignores_typography_too() -> None:
    assert token_f1("肺。", "肺") == 1.0 and token_f1("Crohn\u2019s colitis", "Crohn's disease") == 0.5
