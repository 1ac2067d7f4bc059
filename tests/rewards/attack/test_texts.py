"""The completions of an attack: honest ones are what they say, and the scorer takes no other for right.

Run: pytest tests/rewards/attack/test_texts.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.config import DataConfig
from medvqa_rl.core.answers import is_correct, parse_completion
from medvqa_rl.core.prompts import SECTIONS, fits
from medvqa_rl.core.text import is_yes_no, without_invisible
from medvqa_rl.core.types import DEFAULT_WORDING, Sample, Template, Wording
from medvqa_rl.data import load_dataset
from medvqa_rl.rewards.attack.question import Borrowed, Target, make_target
from medvqa_rl.rewards.attack.texts import ATTACKS, RIGHT, WRONG, write_completions

PHANTOM = load_dataset(DataConfig(answer_types=("choice", "closed", "open")), "train")
POOL = [PHANTOM[index] for index in range(40)]
OWN = Wording(think=("[why]", "[/why]"), answer=("[1]", "[/1]"))
ONE_TYPE = {
    kind: next(sample for sample in POOL if sample.answer_type == kind) for kind in ("choice", "closed", "open")
}
LIMIT = 400
"""Characters, which stand for tokens here."""


def target_of(sample: Sample, template: Template = "think_answer", wording: Wording = DEFAULT_WORDING) -> Target:
    found = make_target(sample, POOL, template=template, wording=wording, seed=0)
    assert found is not None
    return found


def is_short(text: str) -> bool:
    return len(text) <= LIMIT


def is_right(target: Target, text: str) -> bool:
    return is_correct(target.sample, parse_completion(text, target.template, target.wording).answer)


@pytest.mark.parametrize("template", SECTIONS)
@pytest.mark.parametrize("wording", [DEFAULT_WORDING, OWN], ids=["default", "own"])
def test_the_scorer_takes_the_honest_right_completion_only_for_right(template: Template, wording: Wording) -> None:
    for sample in filter(lambda sample: fits(sample, template), POOL[:20]):
        target = target_of(sample, template, wording)
        texts = write_completions(target, lambda text: len(text) <= 700)
        assert [name for name, text in texts.items() if is_right(target, text)] == [RIGHT]
        for name in (RIGHT, WRONG):
            assert parse_completion(texts[name], template, wording).is_well_formed
        assert all(len(text) <= 700 for text in texts.values())


def test_attacks_on_the_types_of_questions() -> None:
    names = {kind: write_completions(target_of(sample), is_short).keys() for kind, sample in ONE_TYPE.items()}
    of_letters = {"wrong letter, right text", "right letter, wrong text"}
    own_case = {"tags in other case"}
    assert names["choice"] == {RIGHT, WRONG, *ATTACKS}
    assert names["closed"] == names["open"] == {RIGHT, WRONG, *ATTACKS} - of_letters
    numbered = target_of(ONE_TYPE["choice"], wording=OWN)
    assert write_completions(numbered, is_short).keys() == {RIGHT, WRONG, *ATTACKS} - own_case


FILLED = {
    *("verbose", "repeated sentence", "white space", "padding before the answer", "padding in the answer", "keywords"),
    *("keywords in the answer", "invisible padding", "invisible in words", "homoglyphs", "full-width letters"),
    *("other scripts", "several borrowed"),
}


@pytest.mark.parametrize("limit", [300, 401, 997])
def test_filled_texts_end_just_below_the_limit(limit: int) -> None:
    """The longest unit that they are filled with has fewer than 200 characters."""
    texts = write_completions(target_of(ONE_TYPE["choice"]), lambda text: len(text) <= limit)
    for name in FILLED:
        assert limit - 200 < len(texts[name]) <= limit, name


def test_texts_by_hand() -> None:
    sample = Sample("q", "What is shown?", "B", "choice", options=("a mass", "a cyst", "no lesion"))
    target = Target(sample, "C", borrowed=[Borrowed("There is a mass.", "A")], others=("no lesion", "edema"))
    texts = write_completions(target, is_short)
    wrong = "<think>It shows that the answer is no lesion.</think>"
    assert (
        texts[RIGHT] == "<think>The image was examined. It shows that the answer is a cyst.</think><answer>B</answer>"
    )
    assert texts[WRONG] == (
        "<think>The image was examined. It shows that the answer is no lesion.</think><answer>C</answer>"
    )
    assert texts["every answer"] == f"{wrong}<answer>A, B, C</answer>"
    assert texts["wrong letter, right text"] == f"{wrong}<answer>C: a cyst</answer>"
    assert texts["right letter, wrong text"] == f"{wrong}<answer>B: no lesion</answer>"
    assert texts["second answer is right"] == f"{wrong}<answer>C</answer><answer>B</answer>"
    assert texts["first answer is right"] == f"{wrong}<answer>B</answer><answer>C</answer>"
    assert texts["nested answer tags"] == f"{wrong}<answer>C <answer>B</answer> C</answer>"
    assert texts["tags in other case"] == f"{wrong}<answer>C</answer><ANSWER>B</ANSWER>"
    assert texts["borrowed"] == "<think>There is a mass.</think><answer>A</answer>"
    assert texts["longest borrowed"] == texts["borrowed"]
    assert texts["copied question"] == (
        "<think>What is shown?\nA: a mass\nB: a cyst\nC: no lesion</think><answer>C</answer>"
    )
    assert texts["minimal reasoning"] == "<think>.</think><answer>C</answer>"
    assert without_invisible(texts["invisible padding"]) == texts["minimal reasoning"]
    assert texts["full-width letters"].endswith("<answer>\uff23</answer>")
    assert texts["homoglyphs"].endswith("<answer>\u0421</answer>")
    repeated = parse_completion(texts["invisible in words"]).think or ""
    assert len({*repeated.split(". ")}) > 4 == len({*without_invisible(repeated).split(". ")}) + 2


def test_the_wrong_answer_fits_the_type() -> None:
    for sample in POOL:
        target = target_of(sample)
        assert not is_correct(sample, target.wrong)
        if sample.answer_type == "choice":
            assert len(target.wrong) == 1
        elif is_yes_no(sample.answer):
            assert {target.wrong, sample.answer} == {"yes", "no"}
    hidden = replace(ONE_TYPE["choice"], question="What?", options=("mass", "cyst"), answer="A")
    assert target_of(hidden, "open_ended").wrong == "cyst"


def test_no_wrong_answer_is_known() -> None:
    def make(sample: Sample, *others: Sample) -> Target | None:
        return make_target(sample, [sample, *others], template="think_answer", wording=DEFAULT_WORDING, seed=0)

    only = Sample("q", "Where?", "left", "open")
    assert make(only) is None
    assert make(only, replace(only, id="same")) is None
    found = make(only, replace(only, id="other", answer="the right side"))
    assert found is not None and found.wrong == "the right side"
    all_right = Sample("c", "Which?", "A", "choice", options=("mass", "cyst"), alternatives=("B",))
    assert make(all_right) is None
    groups = Sample("c", "Which blood group?", "A", "choice", options=("B", "A"))  # an option that reads as a letter
    assert target_of(groups).wrong == "B"
    twice = Sample("c", "Which?", "A", "choice", options=("mass", "a mass", "cyst"))
    assert (make(twice) or target_of(twice)).wrong == "C"  # the same text under another letter is not wrong


def test_borrowed_reasoning_names_the_letter_of_this_question() -> None:
    options = ("mass", "cyst", "scar")
    sample = Sample("q", "Which finding is seen?", "B", "choice", options=options, reasoning="So it is cyst B.")
    donor = replace(sample, id="d", options=("scar", "mass"), answer="A", reasoning="A scar is seen, so it is Scar A.")
    found = make_target(sample, [donor], template="think_answer", wording=DEFAULT_WORDING, seed=0)
    assert found is not None and found.borrowed == [Borrowed("A scar is seen, so it is scar C.", "C")]
    texts = write_completions(found, is_short)
    assert texts[RIGHT] == "<think>So it is cyst B.</think><answer>B</answer>"
    wrong = {"A": "mass A", "C": "scar C"}[found.wrong]
    assert texts[WRONG] == f"<think>So it is {wrong}.</think><answer>{found.wrong}</answer>"


def test_only_the_conclusion_of_yes_and_no_is_reversed() -> None:
    sample = Sample("q", "Is there a mass?", "no", "closed", reasoning="No mass is seen. So the answer is no.")
    texts = write_completions(target_of(sample), is_short)
    assert texts[WRONG] == "<think>No mass is seen. So the answer is yes.</think><answer>yes</answer>"


def test_a_long_reference_gives_way_to_plain_sentences() -> None:
    sample = replace(ONE_TYPE["choice"], reasoning="Long. " * 100)
    target = target_of(sample)
    assert "The image was examined." in write_completions(target, is_short)[RIGHT]
    assert "Long." in write_completions(target, lambda text: len(text) < 2000)[RIGHT]


def test_texts_depend_on_the_seed_and_nothing_else() -> None:
    def write(seed: int) -> dict[str, str]:
        targets = [make_target(one, POOL, template="think_answer", wording=DEFAULT_WORDING, seed=seed) for one in POOL]
        return {
            f"{place} {name}": text
            for place, target in enumerate(targets)
            if target
            for name, text in write_completions(target, is_short).items()
        }

    assert write(0) == write(0) != write(1)


TEXTS = st.text(st.sampled_from("ab AB.,<>/\u200b\u202e\uff21é是\n"), max_size=12)


@given(TEXTS.filter(lambda text: text.strip()), TEXTS, st.lists(TEXTS, max_size=3), st.booleans())
def test_any_data_can_be_attacked(question: str, gold: str, others: list[str], is_choice: bool) -> None:
    options = tuple(dict.fromkeys([gold, *others]))
    sample = Sample("q", question, "A" if is_choice else gold, "choice" if is_choice else "open")
    sample = replace(sample, options=options if is_choice else (), reasoning=question)
    pool = [Sample(f"o{place}", text, text, "open", reasoning=text) for place, text in enumerate(others)]
    target = make_target(sample, pool, template="think_answer", wording=DEFAULT_WORDING, seed=0)
    if target is None:
        return
    assert not is_correct(sample, target.wrong)
    texts = write_completions(target, is_short)
    assert not is_right(target, texts[WRONG])
    assert all(isinstance(text, str) for text in texts.values())
