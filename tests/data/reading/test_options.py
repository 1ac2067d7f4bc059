"""Options that carry letters, and the option that a gold answer names.

Run: pytest tests/data/reading/test_options.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.core.types import LETTERS
from medvqa_rl.data.reading.options import find_gold, option_columns, read_options, without_labels
from medvqa_rl.data.reading.rows import Repairs, Unusable

FORMS = (
    *("{}. {}", "{}) {}", "({}) {}", "{}: {}", "{} - {}", "{} – {}", "[{}] {}", "{}.{}", "({}). {}", "{}] {}"),
    *("{}、{}", "{}：{}", "（{}）{}", "{}．{}", "【{}】{}", "Option {}: {}", "choice {}. {}"),
)
FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(ord("A"), ord("Z") + 1)})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("letters", ["ABCD", "abcd", "ABCD".translate(FULL_WIDTH)])
def test_letters_are_removed_and_golds_in_the_same_form_found(form: str, letters: str) -> None:
    texts = ("left", "right", "both: upper", "neither")
    options = [form.format(letter, text) for letter, text in zip(letters, texts)]
    repairs: Repairs = {}
    read = read_options(options, repairs)
    assert read.texts == texts and repairs == {'option prefixes "A:" removed': ""}
    for index, option in enumerate(options):
        for gold in (option, texts[index], texts[index].upper()):
            assert find_gold(read, None, gold, {}) == "ABCD"[index]
    with pytest.raises(Unusable):
        find_gold(read, None, form.format(letters[0], "right"), {})


@given(
    st.lists(st.text("lungheart 2,", min_size=1).map(str.strip).filter(bool), min_size=2, max_size=26),
    st.sampled_from(FORMS),
)
def test_any_options_in_any_form_lose_their_letters_only(texts: list[str], form: str) -> None:
    assert without_labels([form.format(letter, text) for letter, text in zip(LETTERS, texts)]) == tuple(texts)
    assert without_labels(texts) is None


def test_letters_in_several_forms_are_removed_together() -> None:
    options = ("A. left", "B) right", "(C) none", "Option D: both")
    assert read_options(options, {}).texts == ("left", "right", "none", "both")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ("image,option_a,option_b,Option_C", "option_a,option_b,Option_C"),
        ("Choice B,Choice A,answer", "Choice A,Choice B"),
        ("opa,opb,opc,opd,cop", "opa,opb,opc,opd"),
        ("Option 1,Option 2,Option 10", "Option 1,Option 2"),
        ("D,A,question,B,C", "A,B,C,D"),
        ("a,b,question", ""),
        ("A,answer", ""),
        ("B,C", ""),
        ("option_b,option_c", ""),
        ("option_a,choice_b", ""),
        ("optional,options,operator", ""),
    ],
)
def test_columns_of_one_option_each(columns: str, found: str) -> None:
    assert ",".join(option_columns(tuple(columns.split(",")))) == found


@pytest.mark.parametrize(
    "options",
    [
        ("A. left", "right"),
        ("A. fumigatus", "C. albicans"),
        ("B. left", "A. right"),
        ("A. left", "b. right"),
        ("A. ", "B. "),
        ("A", "B"),
        ("A-line", "B-line"),
        ("A wave", "B wave"),
        ("Apical", "Basal"),
    ],
)
def test_other_options_keep_their_letters(options: tuple[str, ...]) -> None:
    assert read_options(options, {}).texts == options


@pytest.mark.parametrize(
    ("gold", "letter"),
    [
        ("B. right", "B"),
        ("B) right", "B"),
        ("(B) right", "B"),
        ("B - right", "B"),
        ("B、right", "B"),
        ("the right", "B"),
        ("right (B)", "B"),
        ("2.0", "D"),
        ("A. right", None),
        ("A: right", None),
        ("rightmost", None),
    ],
)
def test_a_gold_text_names_the_option_that_an_answer_would(gold: str, letter: str | None) -> None:
    options = read_options(("left", "right", "none", "2"), {})
    if letter is None:
        with pytest.raises(Unusable, match="answer is none of the options"):
            find_gold(options, None, gold, {})
    else:
        assert find_gold(options, None, gold, {}) == letter
