"""The answer parser and the scorer: tables of good and bad strings, and properties of every string.

Run: pytest tests/core/test_answers.py
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strings import PIECES

from medvqa_rl.core.answers import answer_f1, is_correct, parse_completion, read_choice, score_correctness, token_f1
from medvqa_rl.core.prompts import (
    INSTRUCTIONS,
    SECTIONS,
    TAGS,
    as_asked,
    render_answer,
)
from medvqa_rl.core.text import neutralise, normalise, without_invisible
from medvqa_rl.core.types import LETTERS, AnswerType, Sample

OPTIONS = ("pleural effusion", "no finding", "mass", "mass")
FINDINGS = ("pleural effusion", "A mass", "no finding", "two cysts")


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


@pytest.mark.parametrize(
    ("text", "think", "answer", "is_well_formed"),
    [
        ("<think>why</think><answer>B</answer>", "why", "B", True),
        (" \n<think> why </think>\n\t<answer> B\n</answer> \n", "why", "B", True),
        ("<think>a < b</think><answer>x > y</answer>", "a < b", "x > y", True),
        # something outside the sections
        ("So: <think>why</think><answer>B</answer>", "why", "B", False),
        ("<think>why</think> hence <answer>B</answer>", "why", "B", False),
        ("<think>why</think><answer>B</answer>.", "why", "B", False),
        # empty sections
        ("<think></think><answer>B</answer>", None, "B", False),
        ("<think>why</think><answer> \n</answer>", "why", None, False),
        # a missing tag
        ("<answer>B</answer>", None, "B", False),
        ("<think>why<answer>B</answer>", None, "B", False),
        ("why</think><answer>B</answer>", None, "B", False),
        ("<think>why</think><answer>B", "why", None, False),
        ("<think>why</think>B</answer>", "why", None, False),
        ("<think>why", None, None, False),
        ("B", None, None, False),
        ("", None, None, False),
        # wrong order
        ("<answer>B</answer><think>why</think>", "why", "B", False),
        ("</think>why<think><answer>B</answer>", None, "B", False),
        ("<think>why</think></answer>B<answer>", "why", None, False),
        ("<think>why<answer>B</answer></think>", "why<answer>B</answer>", "B", False),
        # a section twice
        ("<think>why</think><answer>B</answer><answer>C</answer>", "why", None, False),
        ("<think>why</think><answer>B</answer><answer>B</answer>", "why", None, False),
        ("<think>a</think><think>b</think><answer>B</answer>", None, "B", False),
        ("<think>a<think>b</think><answer>B</answer>", None, "B", False),
        # tags are exact
        ("<THINK>why</THINK><ANSWER>B</ANSWER>", None, None, False),
        ("< think>why</think><answer>B</answer>", None, "B", False),
    ],
)
def test_completions_are_parsed_as_in_the_table(
    text: str, think: str | None, answer: str | None, is_well_formed: bool
) -> None:
    parsed = parse_completion(text)
    assert (parsed.think, parsed.answer, parsed.is_well_formed) == (think, answer, is_well_formed)


def test_the_direct_template_takes_the_whole_text() -> None:
    parsed = parse_completion("  pleural effusion\n", "direct")
    assert (parsed.think, parsed.answer, parsed.is_well_formed) == (None, "pleural effusion", True)
    parsed = parse_completion(" \n", "direct")
    assert (parsed.answer, parsed.is_well_formed) == (None, False)


def test_the_direct_template_leaves_out_reasoning_before_the_answer() -> None:
    """Models that always reason do so whatever the prompt asks for."""
    assert parse_completion("<think>\nA line.</think>\n\nNo finding.", "direct").answer == "No finding."
    assert parse_completion("<think>\nToo long to", "direct").answer is None
    assert parse_completion("No finding. <think>Or is there?</think> A mass", "direct").answer == (
        "No finding. <think>Or is there?</think> A mass"
    )


@given(PIECES)
def test_any_text_is_parsed_without_contradiction(text: str) -> None:
    parsed = parse_completion(text)
    if parsed.is_well_formed:
        assert parsed.think and parsed.answer
        # Well formed means that the text is exactly its two sections and white space.
        inside = text.split("<think>")[1].split("</answer>")[0]
        assert inside.split("</think>")[0].strip() == parsed.think
        assert inside.split("<answer>")[1].strip() == parsed.answer
        assert all(text.count(tag) == 1 for tag in TAGS)
    if parsed.answer is not None:
        assert parsed.answer == parsed.answer.strip() != ""
        assert text.count("<answer>") == text.count("</answer>") == 1


@given(PIECES, PIECES)
def test_rendered_completions_are_parsed_back(think: str, answer: str) -> None:
    parsed = parse_completion(render_answer(think, answer))
    expected = neutralise(think.strip())[0], neutralise(answer.strip())[0]
    assert parse_completion(render_answer(think, answer, "direct"), "direct").answer == (expected[1] or None)
    shown = tuple(text if without_invisible(text).strip() else "" for text in expected)
    assert (parsed.think or "", parsed.answer or "") == shown
    assert parsed.is_well_formed == all(shown)


@pytest.mark.parametrize("nothing", ["\u200b", "\u00ad \u2060", "\u202e\u202c", "\u2066\n\u2069", "\ufeff"])
def test_a_section_of_invisible_characters_is_empty(nothing: str) -> None:
    """They cost tokens, and would be rewarded as reasoning in the right format."""
    parsed = parse_completion(f"<think>{nothing}</think><answer>B</answer>")
    assert parsed.think is None and parsed.answer == "B" and not parsed.is_well_formed
    assert parse_completion(f"<think>x</think><answer>{nothing}</answer>").answer is None
    assert parse_completion(f"<think>x{nothing}</think><answer>B</answer>").think == f"x{nothing}".strip()


@pytest.mark.parametrize(
    ("template", "text", "read"),
    [
        ("short", "<answer>B</answer>", (None, None, "B", True)),
        ("short", "<think>why</think><answer>B</answer>", (None, None, "B", False)),
        ("short", "B", (None, None, None, False)),
        ("explain", "<think>why</think><answer>B</answer>", (None, "why", "B", True)),
        ("explain", "<answer>B</answer>", (None, None, "B", False)),
        ("open_ended", "<think>why</think><answer>a mass</answer>", (None, "why", "a mass", True)),
        ("choice", "<think>why</think>\n<answer>B</answer>", (None, "why", "B", True)),
        (
            "describe_think",
            "<describe>a lung</describe><think>why</think><answer>B</answer>",
            ("a lung", "why", "B", True),
        ),
        ("describe_think", "<think>why</think><answer>B</answer>", (None, "why", "B", False)),
        (
            "describe_think",
            "<think>why</think><describe>a lung</describe><answer>B</answer>",
            ("a lung", "why", "B", False),
        ),
        ("describe_think", "<describe></describe><think>why</think><answer>B</answer>", (None, "why", "B", False)),
        (
            "describe_think",
            "<describe>a lung</describe>so<think>why</think><answer>B</answer>",
            ("a lung", "why", "B", False),
        ),
        ("think_answer", "<describe>a lung</describe><think>why</think><answer>B</answer>", (None, "why", "B", False)),
    ],
)
def test_each_template_is_parsed_in_its_own_format(template: str, text: str, read: tuple[object, ...]) -> None:
    parsed = parse_completion(text, template)
    assert (parsed.description, parsed.think, parsed.answer, parsed.is_well_formed) == read


@given(PIECES, PIECES, PIECES, st.sampled_from(list(INSTRUCTIONS)))
def test_every_template_parses_what_it_renders(description: str, think: str, answer: str, template: str) -> None:
    text = render_answer(think, answer, template, description=description)
    parsed = parse_completion(text, template)
    sections = SECTIONS[template]
    given = {"describe": description, "think": think, "answer": answer}
    clean = {name: neutralise(part.strip())[0] for name, part in given.items()}
    assert (parsed.answer or "") == clean["answer"]
    assert (parsed.think or "") == (clean["think"] if "think" in sections else "")
    assert (parsed.description or "") == (clean["describe"] if "describe" in sections else "")
    assert parsed.is_well_formed == all(clean[name] for name in sections or ("answer",))


@given(PIECES, st.sampled_from([name for name in INSTRUCTIONS if SECTIONS[name]]))
def test_well_formed_equals_the_regular_expression_of_the_format(text: str, template: str) -> None:
    sections = SECTIONS[template]
    form = r"\s*" + r"\s*".join(rf"<{name}>(?P<{name}>.*)</{name}>" for name in sections) + r"\s*"
    match = re.fullmatch(form, text, re.DOTALL)
    once = all(text.count(tag) == 1 for name in sections for tag in (f"<{name}>", f"</{name}>"))
    expected = match is not None and once and all(match[name].strip() for name in sections)
    assert parse_completion(text, template).is_well_formed == expected


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("B)", "B"),
        ("(B)", "B"),
        ("(b).", "B"),
        ("B:", "B"),
        ("B: A mass", "B"),
        ("B. a mass", "B"),
        ("(B) mass", "B"),
        ("B) Mass.", "B"),
        ("B - mass", "B"),
        ("B mass", "B"),
        ("B\nmass", "B"),
        ("A mass", "B"),
        ("mass", "B"),
        ("The mass.", "B"),
        ("Pleural effusion", "A"),
        ("2 cysts", "D"),
        # disagreement of letter and text
        ("A: mass", None),
        ("A. a mass", None),
        ("(A) mass", None),
        ("A) A mass", None),
        ("A, mass", None),
        ("A - mass", None),
        ("B: pleural effusion", None),
        ("B pleural effusion", None),
        # letters that no option has
        ("E", None),
        ("E: mass", None),
        ("E. pleural effusion", None),
        # neither
        ("", None),
        (".", None),
        ("AB", None),
        ("A or B", None),
        ("A, B", None),
        ("A B", None),
        ("Answer: B", "B"),
        ("effusion", None),
        ("no pleural effusion", None),
        ("a", "A"),
    ],
)
def test_choices_are_parsed_as_in_the_table(answer: str, letter: str | None) -> None:
    assert read_choice(answer, FINDINGS) == letter


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("E. coli", ("S. aureus", "E. coli"), "B"),
        ("S. aureus", ("S. aureus", "E. coli"), "A"),
        ("A. fumigatus", ("C. albicans", "A. fumigatus"), "B"),
        ("fumigatus", ("C. albicans", "A. fumigatus"), "B"),
        ("A. fumigatus", ("C. albicans", "fumigatus"), None),
        ("B-cell lymphoma", ("B-cell lymphoma", "T-cell lymphoma"), "A"),
        ("B: T-cell lymphoma", ("B-cell lymphoma", "T-cell lymphoma"), "B"),
        ("T2", ("T1", "T2"), "B"),
        ("III", ("I", "II", "III"), "C"),
        ("I", ("I", "II", "III"), "A"),
        # Letters as texts: the prompt asks for the option's letter.
        ("A", ("B", "A", "AB", "O"), "A"),
        ("O", ("B", "A", "AB", "O"), "D"),
        ("D: O", ("B", "A", "AB", "O"), "D"),
        # Texts that two options share are named by letter only.
        ("cyst", ("cyst", "Cyst.", "mass"), None),
        ("B: cyst", ("cyst", "Cyst.", "mass"), "B"),
        ("B", ("cyst", "Cyst.", "mass"), "B"),
        # Empty and unreadable options are named by letter only.
        (".", ("", "mass"), None),
        ("A", ("", "mass"), "A"),
        ("(think)", ("<think>", "mass"), "A"),
        ("A", (), None),
    ],
)
def test_unusual_options_are_parsed_as_in_the_table(answer: str, options: tuple[str, ...], letter: str | None) -> None:
    assert read_choice(answer, options) == letter


@given(PIECES, st.lists(PIECES, max_size=6).map(tuple))
def test_a_choice_is_one_of_the_options_or_none(answer: str, options: tuple[str, ...]) -> None:
    assert read_choice(answer, options) in (None, *LETTERS[: len(options)])


@given(st.lists(PIECES, min_size=1, max_size=26).map(tuple), st.data())
def test_the_letter_and_the_letter_with_its_text_name_their_option(
    options: tuple[str, ...], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(options) - 1))
    letter = LETTERS[index]
    for answer in (letter, letter.lower(), f"{letter}.", f"({letter})", f"{letter}: {options[index]}"):
        assert read_choice(answer, options) == letter


@given(
    st.lists(
        st.text("abcdefgh ", min_size=3).filter(lambda t: len(normalise(t)) > 2 and t[1] != " "),
        min_size=2,
        max_size=6,
        unique_by=normalise,
    ).map(tuple),
    st.data(),
)
def test_a_label_with_the_text_of_another_option_is_wrong(options: tuple[str, ...], data: st.DataObject) -> None:
    first, second = data.draw(st.permutations(range(len(options))))[:2]
    for form in ("{}: {}", "{}. {}", "({}) {}", "{}) {}", "{} - {}"):
        assert read_choice(form.format(LETTERS[first], options[second]), options) is None


@pytest.mark.parametrize("answer", ["B、右", "B．右", "（B）右", "【B】右", "B：右", "[B]右", "右"])
def test_chinese_separators_of_a_letter(answer: str) -> None:
    assert read_choice(answer, ("左", "右")) == "B"
    assert read_choice(answer.replace("B", "A"), ("左", "右")) == ("B" if answer == "右" else None)


@pytest.mark.parametrize(
    ("answer", "correct"),
    [("ependymoma", True), ("Brain tumor.", True), ("a brain tumor", True), ("tumor", False), (None, False)],
)
def test_any_of_several_answers_is_correct(answer: str | None, correct: bool) -> None:
    sample = Sample("q", "?", "ependymoma", "open", alternatives=("brain tumor",))
    assert is_correct(sample, answer) is correct


def test_any_of_several_options_is_correct() -> None:
    sample = Sample("q", "?", "A", "choice", options=LUNGS, alternatives=("C",))
    assert [is_correct(sample, text) for text in ("A", "B", "heart", "C: heart", "A and C")] == [
        True,
        False,
        True,
        True,
        False,
    ]
    assert sample.reference == sample.gold == "A: left lung (also correct: C: heart)"
    shown = as_asked(sample, "open_ended")
    assert shown.answers == ("left lung", "heart") and is_correct(shown, "Heart")


SETS: list[tuple[str, str, bool]] = [
    ("Spinal Cord, Lung", "Lung, Spinal Cord", True),
    ("腹部、肺", "肺、腹部", True),
    ("Spinal Cord, Lung", "the lung and the spinal cord", True),
    ("Spinal Cord, Lung", "Lung, Lung, Spinal cord.", True),
    ("Spinal Cord, Lung", "Lung", False),
    ("Lung", "Lung, Spinal Cord", False),
    ("left lung, heart", "left heart, lung", False),
    ("left lung, heart", "left, lung heart", False),
    ("heart left, lung", "left lung, heart", False),
    ("no", "no", True),
    ("none", "keine", True),
    ("无", "None.", True),
    ("none", "lung", False),
    ("poumon, cœur", "cœur et poumon", True),
    ("?", "?", True),
    ("?", ",", False),
]


@pytest.mark.parametrize(("gold", "answer", "correct"), SETS)
def test_sets_are_equal_in_any_order_and_texts_are_not(gold: str, answer: str, correct: bool) -> None:
    as_set = Sample("q", "?", gold, "open", answers_as="set")
    assert is_correct(as_set, answer) is correct and is_correct(as_set, gold)
    assert (answer_f1(answer, [gold], "set") == 1.0) >= correct, "what is correct has an F1 of 1"


@pytest.mark.parametrize(("gold", "answer"), [row[:2] for row in SETS[:4]])
def test_texts_are_equal_in_one_order_only(gold: str, answer: str) -> None:
    assert not is_correct(Sample("q", "?", gold, "open"), answer)


def test_the_f1_of_several_answers_is_that_of_the_closest() -> None:
    assert token_f1("brain tumor", "ependymoma", "large brain tumor", "cyst") == pytest.approx(0.8)
    assert answer_f1("lung and heart", ["stone", "liver, lung"], "set") == pytest.approx(0.5)
    assert answer_f1("lung and heart", ["liver, lung"], "text") == pytest.approx(0.4)
    assert answer_f1(None, ["lung"], "set") == 0.0
