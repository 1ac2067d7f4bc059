"""Arms that build a phantom model of another size.

Run: pytest tests/study/plan/test_builds.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cells import store, write
from rich.console import Console

from medvqa_rl.study import running
from medvqa_rl.study.collect import collect
from medvqa_rl.study.plan.recipe import find_recipe, read_recipe
from medvqa_rl.study.running import forecast, is_trained, plan_table, run_study

QUIET = Console(quiet=True)


@pytest.fixture
def sized(given: dict[str, Any]) -> dict[str, Any]:
    """The small recipe with a model that is built, and an arm that starts from it."""
    given["arms"] = {
        "grpo": {"verb": "train"},
        "grpo_small": {"verb": "train", "from": "small"},
        "small": {"verb": "build", "size": "small"},
    }
    given["forecast"] |= {"seconds_per_build": {"small": 900}, "seconds_per_start": 0}
    return given


def test_a_model_is_built_once_and_first(
    sized: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "study"
    recipe = read_recipe(write(tmp_path / "tiny.yaml", sized), output)
    small, reinforced = recipe.cells[-1], recipe.cells[2]
    assert [cell.label for cell in recipe.cells][-1] == "small" and reinforced.start is small
    assert (small.folder, small.checkpoint) == (output / "small" / "small", output / "small" / "small" / "instruct")
    assert reinforced.config.model.path == str(small.checkpoint)
    assert forecast(recipe)[small] == 900 + 4 * 15 and forecast(recipe)[reinforced] == 4 * 60 + 4 * 15
    assert plan_table(recipe).rows[-1][2:6] == ("build", "", "0/1", "not started")
    assert {pair.arm for pair in recipe.pairs} == {"grpo", "grpo_small"}
    called: list[list[str]] = []

    def call(command: Sequence[str], **rest: Any) -> int:
        called.append(list(command))
        if "build" in command:
            small.folder.mkdir(parents=True)
            (small.folder / "build.json").write_text("{}")
        return 0

    monkeypatch.setattr(running.subprocess, "call", call)
    run_study(recipe, output, processes=2, console=QUIET)
    built = [command for command in called if "phantom" in command]
    # One process builds, whatever the number of GPUs.
    words = ["phantom", "build", "--size", "small", "--output", str(small.folder), "--resume"]
    assert built == [[sys.executable, "-m", "medvqa_rl", *words]]
    assert is_trained(small) and all("accelerate.commands.launch" in one for one in called if one not in built)
    order = [" ".join(command) for command in called]
    assert order.index(" ".join(built[0])) < next(i for i, words in enumerate(order) if "grpo_small" in words)


def test_other_settings_do_not_build_again(sized: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.yaml", sized)
    before, after = (
        read_recipe(path, tmp_path, overrides=overrides).cells for overrides in ([], ["optimizer.learning_rate=1e-3"])
    )
    assert before[-1].folder == after[-1].folder and before[2].folder != after[2].folder


def test_a_built_model_is_the_model_before_training(sized: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", sized), tmp_path / "study")
    outcomes = {("small", 0): "100000", ("grpo_small", 0): "111000", ("grpo_small", 1): "111110"}
    store(recipe, outcomes | {("grpo", seed): "111111" for seed in (0, 1)})
    assert collect(recipe).missing == ("small",)
    (recipe.cells[-1].folder / "build.json").write_text("{}")
    collected = collect(recipe)
    small = next(arm for arm in collected.tests["home"] if arm.name == "small")
    assert small.budget.completions == small.budget.steps == 0 and [test.seed for test in small.tests] == [0, 1]
    assert collected.curves.keys() == collected.signs.keys() == {"grpo", "grpo_small"}


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"verb": "build", "size": "huge"}, "arm small, has the unknown size 'huge': use one of small, base, large"),
        ({"verb": "build", "size": "larg"}, "did you mean large"),
        ({"verb": "build"}, r"arm small, has verb, but an arm with verb build has a size and nothing else"),
        ({"verb": "sft", "size": "small"}, "has verb, size, but an arm with verb build has a size"),
        ({"verb": "build", "size": "small", "settings": {"train": {"steps": 3}}}, "has verb, size, settings, but"),
        ({"verb": "build", "size": "small", "from": "grpo"}, "has verb, size, from, but"),
    ],
)
def test_invalid_builds_are_refused(sized: dict[str, Any], arm: dict[str, Any], message: str, tmp_path: Path) -> None:
    sized["arms"]["small"] = arm
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(write(tmp_path / "tiny.yaml", sized), tmp_path / "study")
    assert "\n" not in str(error.value) and not (tmp_path / "study").exists()


def test_unknown_sizes_in_a_forecast_are_refused(sized: dict[str, Any], tmp_path: Path) -> None:
    sized["forecast"]["seconds_per_build"] = {"huge": 1}
    with pytest.raises(ValueError, match=r"under forecast\.seconds_per_build has the unknown key 'huge'"):
        read_recipe(write(tmp_path / "tiny.yaml", sized), tmp_path)


def test_a_forecast_may_name_arms(given: dict[str, Any], tmp_path: Path) -> None:
    given["forecast"]["seconds_per_step"] = {"train": 60, "sft": 30, "grpo": 100}
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path)
    seconds = {cell.arm.name: left for cell, left in forecast(recipe).items()}
    assert seconds == {"zero_shot": 60, "sft": 4 * 30 + 60, "grpo": 4 * 100 + 60}


def test_the_scale_recipe_is_valid_and_fits_its_budget(tmp_path: Path) -> None:
    recipe = read_recipe(find_recipe("scale_phantom"), tmp_path)
    assert recipe.seeds == (0, 1, 2, 3, 4) and sum(forecast(recipe).values()) / 60 <= 480  # two cores, 240 minutes
    assert {cell.arm.size for cell in recipe.cells if cell.arm.verb == "build"} == {"small", "large"}
    by_name = {cell.arm.name: cell for cell in recipe.cells if cell.seed == 0}
    for size in ("small", "base", "large"):
        one, other = (by_name[f"{name}_{size}"].config for name in ("grpo", "dr_grpo"))
        loss = one.loss.model_copy(update={"type": "dr_grpo"})
        advantage = one.advantage.model_copy(update={"scale": "none"})
        # Within a size, only the objective differs.
        assert other == one.model_copy(update={"loss": loss, "advantage": advantage, "output_dir": other.output_dir})
    assert {tuple(series) for trend in recipe.trends for series in trend.series.values()} == {(0.4, 1.5, 6.0)}
