"""Contrasts of two tests of the same questions, and of two arms, computed by hand.

Run: pytest tests/study/plan/test_contrasts.py
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from cells import OUTCOMES, records_of, store, write

from medvqa_rl.study.collect import collect
from medvqa_rl.study.output import write_study
from medvqa_rl.study.plan.contrasts import contrast_rows, matched_by_seed
from medvqa_rl.study.plan.recipe import read_recipe

GIVEN = [{"title": "Reasons, minus not", "of": "home", "minus": "home_direct"}]


def both(given: dict[str, Any]) -> dict[str, Any]:
    """The small recipe with a second test of the same questions, and one of other questions."""
    given["tests"]["home_direct"] = given["tests"]["home"] | {"prompt": {"template": "direct"}}
    given["tests"]["far"] = {"data": {"scanner": "unseen", "num_test": 6}}
    return given | {"contrasts": GIVEN}


def test_differences_are_paired_by_seed_and_question() -> None:
    of = {"grpo": [records_of("111010"), records_of("11001-")], "sft": [records_of("101010"), records_of("111111")]}
    minus = {"grpo": [records_of("010010"), records_of("100011")], "sft": [records_of("001011"), records_of("000000")]}
    grpo, sft = contrast_rows(of, minus, resamples=200)
    # The last question is unscored once, so it is excluded everywhere: 4 and 3 of 5 against 2 and 2, 3 and 5 against
    # 2 and 0.
    assert (grpo.of, grpo.minus) == (pytest.approx(7 / 10), pytest.approx(4 / 10))
    assert grpo.differences == (
        pytest.approx(2 / 5),
        pytest.approx(1 / 5),
    ) and grpo.difference.estimate == pytest.approx(0.3)
    assert sft.differences == (pytest.approx(1 / 5), pytest.approx(1.0))
    assert grpo.difference.low <= 0.3 <= grpo.difference.high
    # If every question of every seed gains the same, so does every paired resample; unpaired ones would vary.
    (same,) = contrast_rows({"a": [records_of("1111")]}, {"a": [records_of("0000")]}, resamples=200)
    assert (same.difference.low, same.difference.high) == (1.0, 1.0)
    (none,) = contrast_rows({"a": [records_of("1100")]}, {"a": [records_of("1100")]}, resamples=200)
    assert (none.difference.low, none.difference.high) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("once", "two", "three"),
    [
        ((False, False), [(1, "by")], [(1, "byp")]),
        ((True, False), [(1, "ay"), (2, "az")], [(1, "ayp")]),
        ((False, True), [(0, "ay"), (1, "by")], [(0, "ayq"), (1, "byp")]),
        ((True, True), [(1, "ay")], [(1, "ayp"), (0, "ayq")]),
    ],
)
def test_cells_are_matched_by_seed(
    once: tuple[bool, bool], two: list[tuple[int, str]], three: list[tuple[int, str]]
) -> None:
    one, other, third = {0: "a", 1: "b"}, {1: "y", 2: "z"}, {1: "p", 0: "q"}
    assert matched_by_seed([one, other], once) == [(seed, tuple(cells)) for seed, cells in two]
    assert matched_by_seed([one, other, third], [*once, False]) == [(seed, tuple(cells)) for seed, cells in three]
    assert matched_by_seed([{}, other], once) == []


def test_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="have different questions"):
        contrast_rows({"a": [records_of("11")]}, {"a": [records_of("111")]}, resamples=10)
    with pytest.raises(ValueError, match="No question of a contrast is scored"):
        contrast_rows({"a": [records_of("--")]}, {"a": [records_of("11")]}, resamples=10)


def test_contrasts_appear_on_the_pages(given: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.yaml", both(given))
    recipe = read_recipe(path, tmp_path / "study")
    store(recipe, OUTCOMES)
    written = {file.name: file for file in write_study(collect(recipe), tmp_path / "tables")}
    (head, *body) = list(csv.reader(written["contrast-1.csv"].read_text().splitlines()))
    assert head[:4] == ["arm", "home", "home_direct", "difference"]
    assert ["grpo", "90.0", "90.0", "+0.0", "+0.0 to +0.0", "+0.0, +0.0"] in body
    assert "### Reasons, minus not" in written["study.md"].read_text()
    assert "<h3>Reasons, minus not</h3>" in written["study.html"].read_text()
    assert read_recipe(path, tmp_path, overrides=["tests.home_direct=null"]).contrasts == ()


def test_two_arms_are_compared_on_every_test(given: dict[str, Any], tmp_path: Path) -> None:
    contrast = {"title": "GRPO, minus SFT", "of": "grpo", "minus": "sft"}
    path = write(tmp_path / "tiny.yaml", both(given) | {"contrasts": [contrast]})
    recipe = read_recipe(path, tmp_path / "study")
    store(recipe, OUTCOMES)
    collected = collect(recipe)
    ((_, rows),) = collected.contrasts
    assert [row.name for row in rows] == list(recipe.tests)
    home = rows[0]
    by_name = {arm.name: arm for arm in collected.tests["home"]}
    assert home.of == pytest.approx(by_name["grpo"].accuracy.estimate)
    assert home.minus == pytest.approx(by_name["sft"].accuracy.estimate)
    assert home.differences == tuple(
        pytest.approx(one - other)
        for one, other in zip(by_name["grpo"].accuracies, by_name["sft"].accuracies, strict=True)
    )
    text = (write_study(collected, tmp_path / "tables"), (tmp_path / "tables/contrast-1.csv").read_text())[1]
    assert text.startswith("test,grpo,sft,difference,") and "\nhome," in text
    assert read_recipe(path, tmp_path, only=["zero_shot"]).contrasts == ()


@pytest.mark.parametrize(
    ("contrasts", "message"),
    [
        ({"of": "home"}, r"as contrasts, but it must be a list of sections with title, of and minus"),
        ([{"of": "home", "minus": "far"}], r"contrast 1, has of, minus, but must have a text as title, of and minus"),
        (
            [GIVEN[0] | {"of": "hme"}],
            r"contrast 1, has the unknown test or arm 'hme': use one of .*: did you mean home\?",
        ),
        ([GIVEN[0] | {"minus": "sft"}], "compares home with sft, but a test and an arm cannot be compared"),
        ([GIVEN[0] | {"of": "sft", "minus": "sft"}], "compares the arm sft with itself: name two arms"),
        ([*GIVEN, GIVEN[0] | {"of": "far"}], r"contrast 2, compares far with home_direct, but must compare two tests"),
        ([GIVEN[0] | {"of": "home_direct"}], "compares home_direct with home_direct, but must compare two tests"),
    ],
)
def test_invalid_contrasts_are_refused(given: dict[str, Any], tmp_path: Path, contrasts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(write(tmp_path / "tiny.yaml", both(given) | {"contrasts": contrasts}), tmp_path)
    assert "\n" not in str(error.value)
