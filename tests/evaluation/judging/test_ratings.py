"""What raters said: read strictly, summed up by hand.

Run: pytest tests/evaluation/judging/test_ratings.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medvqa_rl.evaluation.judging.ratings import (
    KeyItem,
    RaterFile,
    Rating,
    SheetKey,
    read_key,
    read_ratings,
    summarise_ratings,
    write_key,
)
from medvqa_rl.evaluation.statistics.raters import alpha_interval, kappa_interval

KEY = SheetKey(
    "abc",
    0,
    ("base", "tuned"),
    (
        KeyItem("1", "q1", "i1", ("base",), False),
        KeyItem("2", "q1", "i1", ("tuned",), True),
        KeyItem("3", "q2", "i2", ("base", "tuned"), True),
        KeyItem("4", "q3", "i3", ("tuned",), True),
        KeyItem("5", "q3", "i3", ("base",), True),
    ),
)
ANNA = RaterFile("Anna", {"1": Rating(False, 1), "2": Rating(True, 3), "3": Rating(True, 2), "4": Rating(None, 0)})
BEN = RaterFile("Ben", {"1": Rating(False, 0), "2": Rating(False, 2), "3": Rating(True, 2), "4": Rating(True, None)})


def saved(**changes: Any) -> dict[str, Any]:
    row = {"item": "1", "correct": True, "reasoning": 2, "comment": ""}
    return {"format": "medvqa-rl ratings 1", "sheet": "abc", "rater": "Anna", "ratings": [row]} | changes


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_two_raters_are_summarised_by_hand() -> None:
    found = summarise_ratings(KEY, [ANNA, BEN])
    base, tuned = found["evaluations"]
    # base: items 1 (wrong, wrong) and 3 (right, right); item 5 nobody rated. tuned: 2 (right, wrong), 3, 4 (right).
    assert (base["items"], tuned["items"]) == (2, 3)
    assert base["accuracy"]["estimate"] == pytest.approx(1 / 2) and base["scorer_accuracy"] == pytest.approx(1 / 2)
    assert tuned["accuracy"]["estimate"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert base["reasoning"]["estimate"] == pytest.approx((0.5 + 2) / 2)
    assert tuned["reasoning"]["estimate"] == pytest.approx((2.5 + 2 + 0) / 3)
    assert found["comments"] == []
    (gain,) = found["differences"]
    assert gain["accuracy"]["questions"] == 2 and gain["accuracy"]["estimate"] == pytest.approx((0.5 + 0) / 2)
    assert gain["reasoning"]["estimate"] == pytest.approx((2.0 + 0) / 2)
    correct, reasoning = found["agreement"]["correct"], found["agreement"]["reasoning"]
    assert correct["items"] == 3 and correct["same"]["estimate"] == pytest.approx(2 / 3)
    assert correct["kappa"]["estimate"] == pytest.approx(kappa_interval([0, 1, 1], [0, 0, 1], range(3)).estimate)
    assert correct["alpha"]["estimate"] == pytest.approx(
        alpha_interval([[0, 0], [1, 0], [1, 1]], range(3), levels=2, scale="nominal").estimate
    )
    assert reasoning["kappa"]["estimate"] == pytest.approx(
        kappa_interval([1, 3, 2], [0, 2, 2], range(3), levels=4, scale="interval").estimate
    )
    assert found["raters"][0] == {"name": "Anna", "rated": 4, "cannot_tell": 1, "accuracy": 2 / 3, "reasoning": 1.5}


def test_one_rater_has_no_agreement_and_three_have_no_kappa() -> None:
    alone = summarise_ratings(KEY, [ANNA])
    assert alone["agreement"] is None
    cara = RaterFile("Cara", {"3": Rating(False, 3)})
    found = summarise_ratings(KEY, [ANNA, BEN, cara])["agreement"]
    assert "kappa" not in found["correct"] and found["reasoning"]["items"] == 3
    assert found["reasoning"]["alpha"]["estimate"] == pytest.approx(
        alpha_interval([[1, 0], [3, 2], [2, 2, 3], [0]], range(4), levels=4, scale="interval").estimate
    )
    with pytest.raises(ValueError, match="Two files are by the rater 'Anna'"):
        summarise_ratings(KEY, [ANNA, ANNA])


def test_cannot_tell_counts_as_missing() -> None:
    unsure = RaterFile("Dan", {"1": Rating(None, None)})
    found = summarise_ratings(KEY, [unsure, RaterFile("Eve", {"2": Rating(None, 1)})])
    assert found["evaluations"][0]["accuracy"] is None and found["evaluations"][1]["reasoning"]["estimate"] == 1.0
    assert found["differences"][0]["accuracy"] is None
    assert found["agreement"]["correct"] == {"items": 0, "same": None, "alpha": None, "kappa": None}
    assert math.isnan(found["raters"][0]["accuracy"])


def test_a_key_is_read_back(tmp_path: Path) -> None:
    write_key(KEY, tmp_path / "sheet.key.json")
    assert read_key(tmp_path / "sheet.key.json") == KEY


def test_ratings_are_read(tmp_path: Path) -> None:
    rows = [
        {"item": "1", "correct": False, "reasoning": 0, "comment": "x"},
        {"item": "4", "correct": None, "reasoning": None, "comment": ""},
    ]
    found = read_ratings(write(tmp_path / "a.json", saved(ratings=rows, rater=" Anna ")), KEY)
    assert found == RaterFile("Anna", {"1": Rating(False, 0, "x"), "4": Rating(None, None)})


ROW = saved()["ratings"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not of the format 'medvqa-rl ratings 1': give a file that the rating sheet saved"),
        (saved(format="medvqa-rl rating key 1"), "is not of the format"),
        (saved(extra=1), "does not hold exactly sheet, rater and ratings"),
        (saved(ratings={}), "does not hold exactly sheet, rater and ratings"),
        (saved(sheet="xyz"), "rates the sheet 'xyz', but the key belongs to the sheet 'abc'"),
        (saved(rater=" "), "names no rater"),
        (saved(rater=7), "names no rater"),
        (saved(ratings=[]), "holds no rating"),
        (saved(ratings=[ROW, 3]), "Rating 2 of .* does not hold exactly item, correct, reasoning and comment"),
        (saved(ratings=[ROW | {"more": 1}]), "Rating 1 of .* exactly"),
        (saved(ratings=[ROW | {"item": "9"}]), "is for the item '9', which the sheet does not have"),
        (saved(ratings=[ROW | {"item": ["1"]}]), "which the sheet does not have"),
        (saved(ratings=[ROW, ROW]), "Rating 2 of .* rates the item '1' a second time"),
        (saved(ratings=[ROW | {"correct": "yes"}]), "has 'yes' under correct: write true, false, or null"),
        (saved(ratings=[ROW | {"correct": 1}]), "has 1 under correct"),
        (saved(ratings=[ROW | {"reasoning": 4}]), "has 4 under reasoning"),
        (saved(ratings=[ROW | {"reasoning": True}]), "has True under reasoning"),
        (saved(ratings=[ROW | {"reasoning": 2.0}]), "has 2.0 under reasoning"),
        (saved(ratings=[ROW | {"comment": None}]), "has a comment that is not a text"),
    ],
)
def test_unexpected_ratings_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_ratings(write(tmp_path / "a.json", content), KEY)


def test_invalid_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no file"):
        read_key(tmp_path / "no.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not JSON"):
        read_key(tmp_path / "bytes.json")
    with pytest.raises(ValueError, match="is not of the format"):
        read_key(write(tmp_path / "a.json", saved()))
    plain = KEY.to_json()
    first, *others = plain["items"]
    for broken, what in (
        ({"items": 3}, r"b.json has 3 under items .should be a valid array."),
        ({"items": [{}]}, "b.json has no field items.0.item: make the sheet again"),
        ({"items": [first | {"is_correct": 7}, *others]}, "has 7 under items.0.is_correct"),
        ({"items": [first | {"evaluations": "base"}, *others]}, "has 'base' under items.0.evaluations"),
        ({"items": [first, first, *others]}, "an item is missing, or stands twice"),
        ({"items": []}, "an item is missing, or stands twice"),
        ({"seed": "0"}, "has '0' under seed"),
    ):
        with pytest.raises(ValueError, match=what):
            read_key(write(tmp_path / "b.json", plain | broken))
    with pytest.raises(ValueError, match="an item belongs to no evaluation"):
        read_key(write(tmp_path / "c.json", {**plain, "evaluations": ["base"]}))


leaves = st.none() | st.booleans() | st.integers(-2, 5) | st.floats(0, 3) | st.text(max_size=3)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)
rows = st.fixed_dictionaries({"item": leaves, "correct": leaves, "reasoning": leaves, "comment": leaves})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(rows | anything, max_size=4) | anything, leaves)
def test_any_file_is_ratings_or_a_clear_error(tmp_path: Path, ratings: Any, rater: Any) -> None:
    path = write(tmp_path / "a.json", saved(ratings=ratings, rater=rater))
    try:
        found = read_ratings(path, KEY)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert found.ratings and all(rating.reasoning in (None, 0, 1, 2, 3) for rating in found.ratings.values())
