"""Values of table cells that a spreadsheet, pandas or a wrong decoding bent.

Run: pytest tests/data/reading/test_rows.py
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.data.reading.rows import Repairs, clean_text, distinct, without_point_zero

REPAIR = "control characters of a wrong decoding"


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2"), (-3.0, "-3"), (2.5, "2.5"), (2, "2"), (0.0, "0"), (1e300, "1e+300"), (True, "True")],
)
def test_whole_numbers_have_no_point(value: float, text: str) -> None:
    repairs: Repairs = {}
    kind = "true or false" if value is True else "number"
    assert clean_text(value, "answer", repairs) == text and repairs == {f"{kind} in place of text": f"answer: {text}"}
    assert clean_text(math.inf, "answer", {}) == "inf"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("2.0", "2"),
        ("-2.0", "-2"),
        ("2.00", "2.00"),
        ("2.5", "2.5"),
        ("v2.0", "v2.0"),
        (".0", ".0"),
        ("1.0.0", "1.0.0"),
    ],
)
def test_only_whole_numbers_lose_their_point(text: str, whole: str) -> None:
    assert without_point_zero(text) == whole


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_text_that_was_read_as_latin_1_is_read_again(text: str) -> None:
    text = " ".join(text.split())
    for encoding in ("utf-8", "cp1252"):
        try:
            wrong = text.encode(encoding).decode("latin-1")
        except UnicodeEncodeError:
            continue
        if any("\x80" <= character <= "\x9f" for character in wrong):
            repairs: Repairs = {}
            assert clean_text(wrong, "answer", repairs) == text and repairs == {REPAIR: wrong}


def test_quotes_of_windows_are_recovered_and_sound_text_is_kept() -> None:
    assert clean_text("Crohn\x92s \x93colitis\x94\x85 5\xa0\xb5m", "answer", {}) == "Crohn’s “colitis”… 5 µm"
    repairs: Repairs = {}
    for text in ("Sjögren’s", "Ménière", "腹部、肺", "Ã©"):
        assert clean_text(text, "answer", repairs) == text
    assert repairs == {}


def test_equal_alternatives_count_once() -> None:
    assert distinct(["Mass.", "cyst", "the mass", "Cyst", "nodule"], "mass") == ("cyst", "nodule")
    assert distinct([], "mass") == ()
