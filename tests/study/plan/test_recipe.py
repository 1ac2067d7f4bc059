"""Recipes: invalid ones are refused with one sentence, shipped ones are valid and fit their budget.

Run: pytest tests/study/plan/test_recipe.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cells import write

from medvqa_rl.study.plan.recipe import find_recipe, read_recipe
from medvqa_rl.study.running import forecast


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "gpro"}, "has baseline 'gpro', but must name one of its arms: zero_shot, sft, grpo"),
        ({"baseline": ["grpo"]}, "must name one of its arms"),
        ({"primary": ["unseen"]}, "has primary \\['unseen'\\], but must name one of its tests"),
        (
            {
                "tables": [
                    {
                        "title": "T",
                        "arms": ["grpo"],
                        "metrics": ["accuracy"],
                        "published": {"grpo": {"accuracy": {"value": 1, "certain": [["value"]]}}},
                    }
                ]
            },
            "may list under certain those that the paper's own summary states",
        ),
        ({"arm": {}}, "has the unknown key 'arm': use one of baseline, .*: did you mean arms"),
        ({"seeds": []}, r"has seeds \[\], but must have a list of whole numbers"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": [True]}, "must have a list of whole numbers"),
        ({"tests": {}}, "has no tests"),
        ({"tests": {"home": {"data": {"scaner": "home"}}}}, r"test home: data\.scaner .* did you mean data\.scanner"),
        ({"arms": {}}, "has no arms"),
        ({"arms": {"grpo": {"verb": "dpo"}}}, "arm grpo, has verb 'dpo', but must have one of none, train, sft"),
        (
            {"arms": {"grpo": {"verb": "train", "weights": {}}}},
            "arm grpo, has the unknown key 'weights': use one of verb",
        ),
        (
            {"arms": {"grpo": {"verb": "train", "settings": {"rewards": {"novelty": 1.0}}}}},
            r"arm grpo: rewards\.novelty .* is not a setting",
        ),
        (
            {"arms": {"grpo": {"verb": "train", "settings": {"rewards": {"ecr": "much"}}}}},
            r"arm grpo: rewards\.ecr is the text 'much', but must be a number",
        ),
        (
            {
                "arms": {
                    "grpo": {
                        "verb": "train",
                        "settings": {"rewards": {"semantic": 1.0}, "eval": {"perplexity_model": "phantom:judge"}},
                    }
                }
            },
            r"arm grpo: eval\.perplexity_model is phantom:judge, but that is the judge that rewards",
        ),
        ({"arms": {"grpo": {"verb": "train", "published": "high"}}}, "has published 'high'"),
        ({"arms": {"a/b": {"verb": "train"}, "grpo": {"verb": "train"}}}, "has an arm 'a/b'"),
        ({"forecast": {"seconds_per_step": {"train": "long"}}}, "forecasts 'long' seconds"),
        ({"settings": 3}, "has 3 as settings, but it must be a section"),
    ],
)
def test_invalid_recipes_are_refused(
    given: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path / "tiny.yaml", given | change), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_unknown_arms_and_recipes_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.yaml", given)
    with pytest.raises(
        ValueError, match=r"has the unknown arm 'grp': use one of zero_shot, sft, grpo: did you mean grpo\?"
    ):
        read_recipe(path, tmp_path, only=["grp"])
    assert [arm.name for arm in read_recipe(path, tmp_path, only=["sft"]).arms] == ["sft", "grpo"]
    with pytest.raises(ValueError, match=r"There is no recipe four_factor: .* did you mean four_factors_"):
        find_recipe("four_factor")


def test_tests_that_share_images_with_training_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        Image.new("RGB", (28, 28)).save(tmp_path / f"{name}.png")
    rows = [("1", "a", "train"), ("2", "b", "val"), ("3", "a", "test")]
    lines = [
        json.dumps({"id": id, "image": f"{image}.png", "question": f"Is it {id}?", "answer": "yes", "split": split})
        for id, image, split in rows
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    given["settings"]["data"] = {"name": "own", "path": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    given["tests"] = {"mine": {}}
    with pytest.raises(
        ValueError, match=r"The test set mine .* shares 1 images with the training set of sft .*a\.png"
    ):
        read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")


@pytest.mark.parametrize(("quick", "limit"), [(False, 120), (True, 15)])
def test_shipped_recipes_are_valid_and_fit_their_budget(quick: bool, limit: float, tmp_path: Path) -> None:
    recipe = read_recipe(find_recipe("four_factors_phantom"), tmp_path, quick=quick)
    assert len(recipe.arms) >= 9 and recipe.tests == ("unseen", "home")
    assert len(recipe.cells) == 1 + (len(recipe.arms) - 1) * (1 if quick else 3)
    assert sum(forecast(recipe).values()) / 60 <= limit
    read_recipe(find_recipe("reward_ablation_phantom"), tmp_path, quick=quick)
    staged = read_recipe(find_recipe("rarl_phantom"), tmp_path, quick=quick)
    assert {cell.start.label for cell in staged.cells if cell.start} == {"warm_up"} and len(staged.contrasts) == 4
    assert sum(forecast(staged).values()) / 60 <= min(limit, 60)
    overrides = ["tests.vqa_rad=null", "tests.slake=null", f"data.path={tmp_path}"]
    with pytest.raises(
        ValueError, match="There is no folder 'images'"
    ):  # every setting is sound, the data is not there
        read_recipe(find_recipe("four_factors_pmc_vqa"), tmp_path, quick=quick, overrides=overrides)


@pytest.mark.parametrize("name", ["../../..", "..", ".", "a/b", "/etc", "", "a b", "x\n", "a\\b", "x" * 101])
@pytest.mark.parametrize("section", ["tests", "arms"])
def test_a_name_stays_inside_the_folder(given: dict[str, Any], section: str, name: str, tmp_path: Path) -> None:
    first = next(iter(given[section].values()))
    given[section] = {**given[section], name: first}
    with pytest.raises(ValueError, match=r"has an arm |has a test ") as caught:
        read_recipe(write(tmp_path / "recipe.yaml", given), tmp_path / "out")
    assert "but names are made of letters, digits, '_', '.' and '-'" in str(caught.value)
    assert not (tmp_path / "out").exists()
