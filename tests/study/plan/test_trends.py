"""Trends, numbers of reasonings and small arms in recipes: what they set, and what is refused.

Run: pytest tests/study/plan/test_trends.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cells import write
from PIL import Image

from medvqa_rl.study.plan.recipe import find_recipe, read_recipe
from medvqa_rl.study.running import forecast

TREND: dict[str, Any] = {"title": "T", "x": "n", "metrics": ["accuracy"], "series": {"a": {"0": "grpo", "50": "sft"}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": ""}, "trend 1, has '' as title, but must have a text"),
        ({"x": 3}, "has 3 as x, but must have a text"),
        ({"test": "far"}, "has the unknown test 'far'"),
        ({"metrics": []}, r"has \[\] as metrics, but must have a list of accuracy"),
        ({"metrics": ["acuracy"]}, "has the unknown metric 'acuracy'.*did you mean accuracy"),
        ({"series": {}}, "has no series"),
        ({"series": {"a": {}}}, "series a, has no arms"),
        ({"series": {"a": {"few": "grpo"}}}, "has the key 'few', but its keys must be numbers"),
        ({"series": {"a": {"-1": "grpo"}}}, "has the key '-1', but its keys must be numbers"),
        ({"series": {"a": {"0": "gpro"}}}, "has the unknown arm 'gpro'.*did you mean grpo"),
        ({"differences": ["a"]}, "as differences, but must have a list of pairs of series"),
        ({"differences": [["a", "b"]]}, "under differences, has the unknown series 'b'"),
        ({"steps_worth": {"series": "a"}}, "under steps_worth, has series, but must have series and reference"),
        ({"steps_worth": {"series": "a", "reference": "gpro"}}, "under steps_worth, has the unknown arm 'gpro'"),
        ({"metric": []}, "has the unknown key 'metric'"),
    ],
)
def test_invalid_trends_are_refused(
    given: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(write(tmp_path / "tiny.yaml", given | {"trends": [TREND | change]}), tmp_path / "study")
    assert "\n" not in str(error.value)


def test_series_are_sorted_by_number(given: dict[str, Any], tmp_path: Path) -> None:
    series = {"a": {"1000": "sft", "50": "grpo", "0.4": "zero_shot"}}
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given | {"trends": [TREND | {"series": series}]}), tmp_path)
    assert list(recipe.trends[0].series["a"].items()) == [(0.4, "zero_shot"), (50, "grpo"), (1000, "sft")]


def test_traces_and_seeds_choose_the_training_data_only(given: dict[str, Any], tmp_path: Path) -> None:
    plain = given["arms"]["sft"]
    given["arms"]["sft"] = plain | {"traces": 5, "data_by_seed": True, "settings": {"data": {"seed": 600}}}
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path)
    cells = [cell for cell in recipe.cells if cell.arm.name == "sft"]
    assert [(cell.config.data.num_train, cell.config.data.seed) for cell in cells] == [(5, 600), (5, 601)]
    assert {(test.config.data.num_train, test.config.data.seed) for cell in recipe.cells for test in cell.tests} == {
        (None, 0)
    }
    others = [cell.config.data for cell in recipe.cells if cell.arm.name == "grpo"]
    assert {(data.num_train, data.seed) for data in others} == {(None, 0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"traces": 0}, "arm sft, has traces 0, but only an arm with verb sft learns reasoning"),
        ({"traces": "many"}, "has traces 'many', but only"),
        ({"traces": True}, "has traces True, but only"),
        ({"traces": 5, "verb": "train"}, "has traces 5, but only an arm with verb sft"),
        ({"data_by_seed": 1}, "has data_by_seed 1, but must have true or false"),
        (
            {"traces": 5, "settings": {"sft": {"use_reasoning": False}}},
            "has traces 5, but sft.use_reasoning is false and the prompts are think_answer, so it would not learn",
        ),
        (
            {"traces": 5, "settings": {"prompt": {"template": "direct"}}},
            "has traces 5, but sft.use_reasoning is true and the prompts are direct, so it would not learn",
        ),
    ],
)
def test_invalid_traces_are_refused(
    given: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given["arms"]["sft"] |= change
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    assert "\n" not in str(error.value) and not (tmp_path / "study").exists()


def test_more_traces_than_the_data_has_and_data_without_reasoning_are_refused(
    given: dict[str, Any], tmp_path: Path
) -> None:
    lines = []
    for number, split in enumerate(["train"] * 4 + ["val", "test"]):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(tmp_path / f"{number}.png")
        row = {"id": f"q{number}", "image": f"{number}.png", "question": "Is it?", "answer": "yes", "split": split}
        lines.append(json.dumps(row | {"reasoning": "" if number == 2 else "It is seen."}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    given["settings"]["data"] = {"name": "own", "path": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    given["tests"] = {"mine": {}}

    def read(traces: int) -> None:
        given["arms"]["sft"]["traces"] = traces
        read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")

    with pytest.raises(ValueError, match=r"arm sft, has traces 5, but own/\S+ has 4 training questions"):
        read(5)
    with pytest.raises(
        ValueError, match=r"has traces 4, but 1 of these questions of own/\S+ have no reasoning \(own/data/q2\)"
    ):
        read(4)


def test_quick_overlays_arms(given: dict[str, Any], tmp_path: Path) -> None:
    given["quick"]["arms"] = {"grpo": {"settings": {"train": {"steps": 3}}}}
    path = write(tmp_path / "tiny.yaml", given)
    steps = {cell.arm.name: cell.config.train.steps for cell in read_recipe(path, tmp_path, quick=True).cells}
    assert (steps["sft"], steps["grpo"]) == (2, 3)
    assert {cell.config.train.steps for cell in read_recipe(path, tmp_path).cells} == {4}
    given["quick"]["arms"] = {"gpro": {}}
    with pytest.raises(ValueError, match="under quick has the unknown arm 'gpro'"):
        read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path, quick=True)


def test_the_cold_start_recipe_is_valid_and_fits_its_budget(tmp_path: Path) -> None:
    recipe = read_recipe(find_recipe("cold_start_phantom"), tmp_path)
    assert recipe.seeds == (0, 1, 2, 3, 4) and sum(forecast(recipe).values()) / 60 <= 480  # two cores, 240 minutes
    starts = {cell.arm.name: cell.start.arm.name for cell in recipe.cells if cell.start}
    assert len(starts) == 12 and all(name.endswith(start) for name, start in starts.items())
    warm_ups = [cell for cell in recipe.cells if cell.arm.traces]
    assert {cell.config.data.num_train for cell in warm_ups} == {50, 200, 1000}
    # Equal steps; own reasonings for each seed, the same numbers of right and wrong ones, on other images than RL's.
    assert {cell.config.train.steps for cell in warm_ups} == {100}
    assert {cell.config.data.seed - cell.seed for cell in warm_ups} == {600}
    assert {(cell.arm.name.startswith("wrong"), cell.config.data.reasoning) for cell in warm_ups} == {
        (False, "reference"),
        (True, "wrong"),
    }
    reinforced = [cell for cell in recipe.cells if cell.arm.verb == "train"]
    assert {(cell.config.data.seed, cell.config.data.reasoning) for cell in reinforced} == {(9, "reference")}
    assert sum(cell.config.train.eval_steps > 0 for cell in reinforced) == len(reinforced)  # steps_worth needs them
    quick = read_recipe(find_recipe("cold_start_phantom"), tmp_path, quick=True)
    assert sum(forecast(quick).values()) / 60 <= 15
