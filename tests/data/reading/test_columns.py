"""Columns are recognised by their names in five languages, and two with one meaning are never chosen between.

Run: pytest tests/data/reading/test_columns.py
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.data.patients import PATIENT_COLUMNS, POSSIBLE_COLUMNS
from medvqa_rl.data.reading.columns import SYNONYMS, AmbiguousColumns, folded, standard_names

NAMES = [(name, other) for name, others in SYNONYMS.items() for other in (name, *others)]


def test_no_name_means_two_things() -> None:
    keys = [folded(other) for _, other in NAMES if other != "patient"] + [*map(folded, PATIENT_COLUMNS)]
    repeated = {key for key in keys if keys.count(key) > 1}
    assert repeated == set() and all(keys)
    assert not set(keys) & {folded(name) for name in POSSIBLE_COLUMNS}


@given(st.sampled_from(NAMES), st.sampled_from([str.upper, str.title, str.casefold]), st.sampled_from(["", " ", "\t"]))
def test_case_blanks_and_punctuation_do_not_count(named: tuple[str, str], change: object, blank: str) -> None:
    name, other = named
    column = blank + change(other).replace("_", blank or "-") + blank  # type: ignore[operator]
    assert standard_names((column, "something else")) == {column: name}


def test_accents_do_not_count() -> None:
    assert (
        standard_names(("Reponse",)) == {"Reponse": "answer"} == {"Reponse": standard_names(("Réponse",))["Réponse"]}
    )


def test_ours_comes_before_other_names_and_the_users_before_all() -> None:
    assert standard_names(("answer", "Answer", "label")) == {"answer": "answer"}
    assert standard_names(("Answer", "label")) == {"Answer": "answer"}
    assert standard_names(("label",)) == {"label": "answer"}
    assert standard_names(("answer", "truth"), (("answer", "truth"),)) == {"truth": "answer"}
    assert standard_names(("answer", " Truth"), (("answer", "truth"),)) == {" Truth": "answer"}
    assert standard_names(("image", "images")) == {}  # both are read
    assert standard_names(("images",)) == {"images": "image"}


@pytest.mark.parametrize("columns", [("label", "solution"), ("Answer", "ANSWER"), ("Antwort", "Lösung")])
def test_two_columns_with_one_meaning(columns: tuple[str, str]) -> None:
    with pytest.raises(AmbiguousColumns) as error:
        standard_names(("image", *columns))
    assert (error.value.standard, error.value.columns) == ("answer", list(columns))
    assert standard_names(columns, (("answer", columns[1]),)) == {columns[1]: "answer"}


def test_the_names_are_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    for name, others in SYNONYMS.items():
        assert not others or f"| `{name}` | {', '.join(others)} |" in page, name
