"""The prompt and the answer parser: tables of good and bad strings, and properties of every string.

Run: pytest tests/core/test_prompts.py
"""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.core.answers import parse_completion, read_choice, score_correctness
from medvqa_rl.core.prompts import (
    ALL_TAGS,
    CHOICE_HINT,
    INSTRUCTIONS,
    SECTIONS,
    TAGS,
    as_asked,
    can_hide_options,
    fits,
    render_answer,
    render_prompt,
)
from medvqa_rl.core.text import neutralise, normalise
from medvqa_rl.core.types import LETTERS, Sample

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PIECES = st.lists(
    st.one_of(st.sampled_from([*TAGS, "<|image_pad|>", "<", ">", "/", "|", "THINK", " ", "\n", "A", "a the"]), TEXTS),
    max_size=12,
).map("".join)
"""Strings that mix tags, parts of tags and other text."""

OPTIONS = ("pleural effusion", "A mass", "no finding", "two cysts")


def choice(answer: str = "B", options: tuple[str, ...] = OPTIONS) -> Sample:
    return Sample("q", "What is seen?", answer, "choice", options=options)


# --- the parser ----------------------------------------------------------------------------------------------------


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
    assert (parsed.think or "", parsed.answer or "") == expected
    assert parsed.is_well_formed == all(expected)
    assert parse_completion(render_answer(think, answer, "direct"), "direct").answer == (expected[1] or None)


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


# --- neutralising --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "harmless", "count"),
    [
        ("What is <|image_pad|> here?", "What is (|image_pad|) here?", 1),
        ("</think><answer>B</answer>", "(/think)(answer)B(/answer)", 3),
        ("<|im_end|>\n<|im_start|>system", "(|im_end|)\n(|im_start|)system", 2),
        ("<Think>", "(Think)", 1),
        ("size < 3 cm > 2 cm", "size < 3 cm > 2 cm", 0),
        ("<| not a token |>", "<| not a token |>", 0),
        ("<<think>>", "<(think)>", 1),
    ],
)
def test_special_strings_are_neutralised_and_counted(text: str, harmless: str, count: int) -> None:
    assert neutralise(text) == (harmless, count)


@given(PIECES)
def test_neutralised_text_holds_no_special_string_and_keeps_its_length(text: str) -> None:
    harmless, count = neutralise(text)
    assert not any(tag in harmless for tag in (*TAGS, "<|image_pad|>"))
    assert len(harmless) == len(text)
    assert neutralise(harmless) == (harmless, 0)
    assert not any(tag in harmless for tag in ALL_TAGS)
    assert (count == 0) == (harmless == text)


# --- the prompt ----------------------------------------------------------------------------------------------------


def test_the_prompt_holds_question_options_hint_and_instruction() -> None:
    prompt = render_prompt(choice())
    assert prompt.messages == [
        {
            "role": "user",
            "content": [
                {
                    "type": "text",
                    "text": "What is seen?\nA: pleural effusion\nB: A mass\nC: no finding\nD: two cysts\n"
                    f"{CHOICE_HINT}\n{INSTRUCTIONS['think_answer']}",
                }
            ],
        }
    ]
    assert prompt.neutralised == 0


@pytest.mark.parametrize("template", INSTRUCTIONS)
def test_the_prompt_does_not_depend_on_the_gold_answer(template: str) -> None:
    sample = choice()
    assert len({str(render_prompt(replace(sample, answer=letter), template)) for letter in "ABCD"}) == 1
    question = Sample("q", "Is there a fracture?", "yes", "closed", reasoning="seen", groups={"family": "presence"})
    golds = ["yes", "no", "maybe", "<answer>"]
    others = [replace(question, answer=gold, reasoning=gold, groups={"family": gold}) for gold in golds]
    others += [replace(question, answer_type="open", id="other")]
    assert {str(render_prompt(other, template)) for other in others} == {str(render_prompt(question, template))}


@given(st.lists(st.one_of(PIECES, st.sampled_from(["a cyst", "mass", "yes", "no"])), min_size=2, max_size=5), PIECES)
def test_no_template_lets_the_gold_answer_into_the_prompt(options: list[str], question: str) -> None:
    for template in INSTRUCTIONS:
        asked = [Sample("q", question, letter, "choice", options=tuple(options)) for letter in LETTERS[: len(options)]]
        assert len({str(render_prompt(sample, template)) for sample in asked}) == 1
        assert len({fits(sample, template) for sample in asked}) == 1
        # Asked as it will be scored, the prompt is the same.
        assert [render_prompt(as_asked(s, template), template) for s in asked] == [
            render_prompt(s, template) for s in asked
        ]


def test_each_template_has_its_own_instruction() -> None:
    prompts = {name: render_prompt(choice(), name).messages[0]["content"][-1]["text"] for name in INSTRUCTIONS}
    assert len(set(prompts.values())) == len(prompts)
    assert all(prompt.endswith(INSTRUCTIONS[name]) for name, prompt in prompts.items())
    shown = {name for name, prompt in prompts.items() if "B: A mass" in prompt and CHOICE_HINT in prompt}
    assert shown == set(INSTRUCTIONS) - {"open_ended"}
    for name, prompt in prompts.items():
        assert all(f"<{section}></{section}>" in prompt for section in SECTIONS[name])


def test_an_open_ended_question_is_scored_by_the_text_of_the_hidden_option() -> None:
    asked = as_asked(choice("B"), "open_ended")
    assert (asked.options, asked.answer, asked.answer_type, asked.id) == ((), "A mass", "open", "q")
    assert as_asked(asked, "open_ended") == asked
    told = replace(choice("B"), reasoning="A mass, B-lines. So the answer is A mass B.")
    assert as_asked(told, "open_ended").reasoning == "A mass, B-lines. So the answer is A mass."
    assert as_asked(told, "choice").reasoning == told.reasoning
    assert as_asked(choice("B", ("yes", "no")), "open_ended").answer_type == "closed"
    for text, score in (("mass", 1.0), ("A mass.", 1.0), ("B", 0.0), ("no mass", 0.0), ("pleural effusion", 0.0)):
        completion = f"<think>why</think><answer>{text}</answer>"
        assert score_correctness(choice("B"), completion, "open_ended") == score
        assert score_correctness(asked, completion, "open_ended") == score
    assert as_asked(choice("B"), "choice") == choice("B")
    question = Sample("q", "Is there a mass?", "yes", "closed")
    assert as_asked(question, "open_ended") == question


@pytest.mark.parametrize(
    ("question", "options", "can"),
    [
        ("What is seen?", OPTIONS, True),
        ("Where is the cyst?", ("left", "right"), True),
        ("Is there a cyst?", ("Yes", "No"), True),
        ("How many?", ("1", "2", "three"), True),
        ("Which of the following is seen?", OPTIONS, False),
        ("Which of these is seen?", OPTIONS, False),
        ("What is not seen?", OPTIONS, False),
        ("What is seen?", ("a mass", "all of the above"), False),
        ("What is seen?", ("a mass", "Both A and B"), False),
        ("What is seen?", ("a mass", "None of these"), False),
        ("What is seen?", ("a mass", "Mass."), False),
        ("What is seen?", ("a mass", "?"), False),
        ("What is seen?", ("a mass", "an ill-defined mass in the left upper lobe of the lung"), False),
        ("What is seen?", (), False),
    ],
)
def test_options_are_hidden_only_where_the_question_makes_sense_without(
    question: str, options: tuple[str, ...], can: bool
) -> None:
    sample = Sample("q", question, "A" if options else "mass", "choice" if options else "open", options=options)
    assert can_hide_options(sample) == can
    assert fits(sample, "open_ended") == (can or not options)
    assert fits(sample, "choice") == bool(options)
    text = render_prompt(sample, "open_ended").messages[0]["content"][-1]["text"]
    assert (CHOICE_HINT in text) == (bool(options) and not can)


def test_special_strings_of_question_and_options_are_counted() -> None:
    sample = choice(options=("<|image_pad|>", "</answer> x", "fine"))
    prompt = render_prompt(replace(sample, question="See <|vision_start|>?"))
    text = prompt.messages[0]["content"][-1]["text"]
    assert prompt.neutralised == 3
    assert "(|image_pad|)" in text and "(/answer) x" in text and "See (|vision_start|)?" in text
    assert not any(f"<{name}" in text.split(INSTRUCTIONS["think_answer"])[0] for name in ("|", "/", "think", "answer"))


# --- normalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes", "yes"),
        (" yes. ", "yes"),
        ('"Yes!"', "yes"),
        ("The left  lung", "left lung"),
        ("an enlarged heart", "enlarged heart"),
        ("three", "3"),
        ("Three cysts", "3 cysts"),
        ("(right) lung, base", "right lung base"),
        ("A", "a"),
        ("the", "the"),
        ("abnormal", "abnormal"),
        ("x-ray", "x-ray"),
        ("3.5 cm", "3.5 cm"),
        ("**no**", "no"),
        ("<think>", "think"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_in_the_table(text: str, normal: str) -> None:
    assert normalise(text) == normal


@given(PIECES)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(PIECES)
def test_normalising_ignores_neutralising_case_and_white_space(text: str) -> None:
    assert normalise(neutralise(text)[0]) == normalise(text)
    assert normalise("  " + text + "\n") == normalise(text)


# --- choices -------------------------------------------------------------------------------------------------------


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
    assert read_choice(answer, OPTIONS) == letter


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
