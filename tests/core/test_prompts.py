"""Prompt templates: their texts, what they may depend on, and hidden options.

Run: pytest tests/core/test_prompts.py
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strings import PIECES

from medvqa_rl.core.answers import parse_completion, score_correctness, without_tags
from medvqa_rl.core.prompts import (
    CHOICE_HINT,
    INSTRUCTIONS,
    SECTIONS,
    RenderedPrompt,
    as_asked,
    can_hide_options,
    fits,
    instruction_for,
    render_answer,
    render_prompt,
)
from medvqa_rl.core.types import LETTERS, Sample, Template, Wording

OPTIONS = ("pleural effusion", "A mass", "no finding", "two cysts")


def choice(answer: str = "B", options: tuple[str, ...] = OPTIONS) -> Sample:
    return Sample("q", "What is seen?", answer, "choice", options=options)


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


def text_of(prompt: RenderedPrompt) -> str:
    text: str = prompt.messages[-1]["content"][-1]["text"]
    return text


OWN = Wording(
    system="You are a radiologist.",
    instruction="Case: {question}\n{options}\nReply as {{json}} in [answer][/answer].",
    think=("[reasoning]", "[/reasoning]"),
    answer=("[answer]", "[/answer]"),
)


def test_the_users_own_words_are_the_whole_prompt() -> None:
    sample = Sample("s", "Which {side}?", "B", "choice", options=("left", "{question}"))
    system, user = render_prompt(sample, "think_answer", OWN).messages
    assert system == {"role": "system", "content": "You are a radiologist."}
    (part,) = user["content"]
    assert part["text"] == "Case: Which {side}?\nA: left\nB: {question}\nReply as {json} in [answer][/answer]."
    other = replace(sample, answer="A")
    assert render_prompt(other, "think_answer", OWN) == render_prompt(sample, "think_answer", OWN)
    closed = Sample("s", "Is it left?", "yes", "closed")
    assert text_of(render_prompt(closed, "think_answer", OWN)) == (
        "Case: Is it left?\nReply as {json} in [answer][/answer]."
    )


def test_other_templates_keep_their_text_with_the_users_tags() -> None:
    sample = Sample("s", "Is it left?", "yes", "closed")
    assert text_of(render_prompt(sample, "explain", OWN)).startswith(
        "Is it left?\nThink in [reasoning][/reasoning], then answer in [answer][/answer]. Explain"
    )
    assert instruction_for("describe_think") == INSTRUCTIONS["describe_think"]


@pytest.mark.parametrize("template", INSTRUCTIONS)
def test_gold_scores_1_in_the_users_tags(template: Template) -> None:
    sample = Sample("s", "Which?", "B", "choice", options=("left", "right [/answer] lung"))
    asked = as_asked(sample, template)
    text = render_answer("it is\n[/Answer] there", asked.answer, template, OWN, description="a film")
    assert parse_completion(text, template, OWN).is_well_formed
    assert score_correctness(sample, text, template, OWN) == 1.0
    if SECTIONS[template]:
        assert parse_completion(text, template).answer is None
        assert parse_completion("<think>x</think><answer>B</answer>", template, OWN).answer is None
        assert "[" not in without_tags(text, OWN.tags)


def test_the_users_tags_in_the_data_are_neutralised_and_counted() -> None:
    sample = Sample("s", "Is [ANSWER] or <think> here?", "no", "closed")
    rendered = render_prompt(sample, "explain", OWN)
    assert text_of(rendered).startswith("Is (ANSWER) or (think) here?") and rendered.neutralised == 2
