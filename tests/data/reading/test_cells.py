"""Images, answers and options in the forms of other tools.

Run: pytest tests/data/reading/test_cells.py
"""

import base64
import json
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvqa_rl.data.reading.cells import (
    Survey,
    as_number,
    image_cells,
    name_images,
    option_cells,
    read_answers,
    survey,
    without_placeholders,
    without_tags,
)
from medvqa_rl.data.reading.options import split_options
from medvqa_rl.data.reading.rows import Unusable

TEXTS = ["left", "right, lower", "none"]


@pytest.mark.parametrize(
    "options",
    [
        TEXTS,
        json.dumps(TEXTS),
        str(TEXTS),
        "left|right, lower|none",
        {"A": "left", "B": "right, lower", "C": "none"},
        {"C": "none", "B": "right, lower", "A": "left", "D": None},
        {"option_a": "left", "option_b": "right, lower", "option_c": "none"},
        {"0": "left", "1": "right, lower", "2": "none"},
        {"1": "left", "2": "right, lower", "3": "none"},
        json.dumps({"A": "left", "B": "right, lower", "C": "none"}),
        str({"A": "left", "B": "right, lower", "C": "none"}),
        [{"letter": letter, "content": text} for letter, text in zip("ABC", TEXTS)],
        [{"label": letter, "text": text} for letter, text in zip("CBA", reversed(TEXTS))],
        [{"text": text} for text in TEXTS],
        {"label": ["A", "B", "C"], "text": TEXTS},
    ],
    ids=str,
)
def test_options_in_every_form(options: Any) -> None:
    assert option_cells({"options": options}, {}) == TEXTS


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"A": "left", "C": "right"}, "options are not named A, B ... in order"),
        ([{"letter": "A", "content": "left"}, {"letter": "A", "content": "right"}], "options are in an unknown form"),
        ([{"letter": "A", "content": "left"}, {"content": "right"}], "options are in an unknown form"),
        ([{"x": 1}], "options are in an unknown form"),
        ("['left'", "options is not a JSON list"),
        ("[print('x')]", "options is not a JSON list"),
        ({"A": {"B": 1}, "B": "x"}, "options is not text"),
    ],
    ids=str,
)
def test_options_that_are_not_understood(options: Any, reason: str) -> None:
    with pytest.raises(Unusable) as error:
        option_cells({"options": options}, {})
    assert error.value.reason == reason


def test_columns_with_one_option_each_in_other_languages() -> None:
    for names in (("Antwort A", "Antwort B"), ("选项A", "选项B"), ("Réponse 1", "Réponse 2")):
        assert option_cells(dict(zip(names, ("x", "y"))), {}) == ["x", "y"]


PNG = b"\x89PNG\r\n"


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"image": "a.png"}, ["a.png"]),
        ({"image": "", "images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ({"image": "['a.png', 'b.png']"}, ["a.png", "b.png"]),
        ({"image": PNG}, [PNG]),
        ({"image": {"bytes": PNG, "path": "a.png"}}, [PNG]),
        ({"image": {"bytes": None, "path": "a.png"}}, ["a.png"]),
        ({"images": [{"bytes": PNG, "path": None}, {"path": "b.png"}]}, [PNG, "b.png"]),
        ({"images": [{"type": "image_url", "image_url": {"url": "file:///x/a.png"}}]}, ["/x/a.png"]),
        ({"image": f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}, [PNG]),
        ({"image_10": "k.png", "image_2": "b.png", "image_1": "a.png", "image_3": None}, ["a.png", "b.png", "k.png"]),
    ],
    ids=str,
)
def test_images_in_every_form(fields: dict[str, Any], found: list[Any]) -> None:
    assert image_cells(fields, {}) == found


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "no image"),
        ({"bytes": b"", "path": None}, "no image"),
        ("https://example.org/a.png", "image is a web address"),
        ("data:image/png;base64,%%%", "damaged base64 of an image"),
        ([b"x", ""], "empty image"),
    ],
    ids=str,
)
def test_images_that_cannot_be_found(image: Any, reason: str) -> None:
    with pytest.raises(Unusable) as error:
        image_cells({"image": image}, {})
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("question", "plain"),
    [
        ("<image>\nIs it?", "Is it?"),
        ("<image><image>Is it? <image>", "Is it?"),
        ("<|vision_start|><|image_pad|><|vision_end|>Is it?", "Is it?"),
        ("<image 1> <image 2> Is it?", "Is it?"),
        ("Is it? <image 1>", "Is it?"),
        ("Is it in <image 2> or <image_3>, too?", "Is it in image 2 or image 3, too?"),
        ("Is p < 0.05 > 0?", "Is p < 0.05 > 0?"),
    ],
)
def test_marks_for_images_leave_the_question(question: str, plain: str) -> None:
    assert without_placeholders(question) == plain


def test_marks_in_options_name_the_image() -> None:
    assert name_images("<image 2>") == "image 2" and name_images("left") == "left"


def test_answers_in_tags() -> None:
    assert without_tags("<think>It is\nwide.</think> <answer>B</answer>") == ("B", "It is\nwide.")
    assert without_tags("<answer>yes</answer>") == ("yes", "")
    assert without_tags("<think>wide</think>\nyes") == ("yes", "wide")
    for text in ("yes", "<answer>a</answer><answer>b</answer>", "<think>wide</think>", "x <think>"):
        assert without_tags(text) == (text, "")
    assert read_answers({"answer": ["<answer>a</answer>", "b"]}, {}) == ["a", "b"]


# --- options in the question --------------------------------------------------------------------------------------

WORDS = st.lists(st.text(string.ascii_lowercase + "äé", min_size=2, max_size=8), min_size=1, max_size=3).map(" ".join)


@given(
    stem=WORDS,
    options=st.lists(WORDS, min_size=2, max_size=8),
    form=st.sampled_from(["{}. ", "{}) ", "({}) ", "{}: ", "[{}] ", "（{}）"]),
    between=st.sampled_from([" ", "\n", ", ", "; ", ",\n"]),
    lead=st.sampled_from(["?", "? Options:", "?\nAnswer Choices: ", " 选项："]),
    lower=st.booleans(),
)
@settings(max_examples=200)
def test_options_are_split_from_the_question(
    stem: str, options: list[str], form: str, between: str, lead: str, lower: bool
) -> None:
    letters = string.ascii_lowercase if lower else string.ascii_uppercase
    text = f"{stem}{lead} {between.join(form.format(letter) + text for letter, text in zip(letters, options))}"
    found = split_options(text)
    assert found is not None and found[1] == tuple(options)
    assert found[0].rstrip("?") == stem


@pytest.mark.parametrize(
    "question",
    [
        "Is there hepatitis A?",
        "Vitamin A. Which one? B. no",  # A and B in one form, but is A an option?
        "Which? A. left",
        "Which? B. left C. right",
        "Which? A. left B. right B. lower",
        "Which? A. left (B) right",
        "Which? A. left C. right",
        "A. left B. right",
        "Which? A. B. right",
        "Which? A. left B. right (A) x (B) y",
        "",
    ],
)
def test_other_questions_have_no_options(question: str) -> None:
    found = split_options(question)
    if question.startswith("Vitamin"):
        assert found == ("Vitamin", ("Which one?", "no"))  # hence only if every question of the table has options
    else:
        assert found is None


def test_the_last_list_of_a_question_counts() -> None:
    text = "A. Smith reports hepatitis A. What is it? A) a cyst B) hepatitis A. C) none"
    assert split_options(text) == ("A. Smith reports hepatitis A. What is it?", ("a cyst", "hepatitis A.", "none"))
    assert split_options("Is A. here or B. there? A. left B. right") == ("Is A. here or B. there?", ("left", "right"))


# --- a whole table ------------------------------------------------------------------------------------------------


def rows(*answers: Any, options: int = 3) -> list[dict[str, Any]]:
    return [{"question": "Which?", "options": TEXTS[:options], "answer": answer} for answer in answers]


@pytest.mark.parametrize(
    ("table", "found"),
    [
        (rows(0, 1, 2), Survey(0, 3, first=0)),
        (rows("1", "2", "3"), Survey(0, 3, first=1)),
        (rows(1.0, 2.0, 0.0), Survey(0, 3, first=0)),
        (rows(1, 2, 1), Survey(0, 3, is_unclear=True)),
        (rows(0, 1, "B"), Survey(0, 3)),
        (rows("A"), Survey(0, 1)),
        ([{"question": "How many?", "options": ["1", "2", "3"], "answer": 2}], Survey(0, 1)),
        ([{"question": "How many?", "options": ["1", "2"], "answer": 2}, *rows(0)], Survey(0, 2, first=0)),
        (
            [{"question": "Is it? A. yes B. no", "answer": 1}, {"question": "It? A) no B) yes", "answer": 0}],
            Survey(2, 2, 0),
        ),
        ([{"question": "Is it? A. yes B. no", "answer": "A"}, {"question": "Is it?", "answer": "yes"}], Survey(1, 2)),
        ([*rows("A"), {"question": "Is it? A. yes B. no", "answer": "A"}], Survey(0, 1)),
        ([{"question": "Is it?", "answer": "no"}] * 3000, Survey(0, 1000)),
        ([], Survey()),
    ],
    ids=[*map(str, range(13))],
)
def test_what_the_rows_say_together(table: list[dict[str, Any]], found: Survey) -> None:
    assert survey(table) == found
    assert found.in_question == (found.questions == 2)


def test_numbers() -> None:
    values = [0, "0", 1.0, "2.0", " 3 ", "27", "-1", "1.5", True, None, "A", "²", [1]]
    assert [as_number(value) for value in values] == [0, 0, 1, 2, 3, *[None] * 8]
