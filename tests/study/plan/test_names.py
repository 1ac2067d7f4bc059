"""Names of cells: unchanged by new settings, changed by changed settings, and checked for changed defaults.

Run: pytest tests/study/plan/test_names.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from cells import OUTCOMES, store, write
from pydantic import BaseModel

from medvqa_rl.config import Config, JudgeConfig, LoraConfig, ModelConfig, PromptConfig, RewardsConfig, leaves
from medvqa_rl.config.base import Identity
from medvqa_rl.study.plan.names import settings_hash
from medvqa_rl.study.plan.recipe import read_recipe


class LaterLora(LoraConfig):
    scaling: Identity[float] = 0.5


class LaterModel(ModelConfig):
    lora: Identity[LaterLora | None] = None
    quantized: Identity[bool] = False


class LaterJudge(JudgeConfig):
    votes: Identity[int] = 1


class LaterRewards(RewardsConfig):
    novelty: Identity[float] = 0.0


class Later(Config):
    """Settings of a later version: new ones in optional and other sections, and a new section."""

    model: LaterModel = LaterModel()
    rewards: LaterRewards = LaterRewards()
    eval_judge: Identity[LaterJudge | None] = None
    asking: PromptConfig = PromptConfig()
    comment: Identity[str | None] = None


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"train": {"seed": 2}, "loss": {"beta": 0.1}},
        {"model": {"lora": {}}},
        {"model": {"lora": {"rank": 8}, "train_vision": True}},
        {"rewards": {"ecr": 1.0, "functions": {"my.reward": 0.5}}, "prompt": {"mix": {"short": 1.0}}},
        {"eval_judge": {}},
        {"eval_judge": {"model": "phantom:judge_eval"}},
    ],
)
def test_new_settings_at_their_defaults_keep_names(given: dict[str, Any]) -> None:
    assert settings_hash(Later.model_validate(given)) == settings_hash(Config.model_validate(given))
    assert settings_hash(Later.model_validate(given | {"comment": "x"})) != settings_hash(Config.model_validate(given))


def test_a_given_section_differs_from_none() -> None:
    names = [
        settings_hash(Config.model_validate(given)) for given in ({}, {"model": {"lora": {}}}, {"eval_judge": {}})
    ]
    assert len(set(names)) == 3
    assert settings_hash(Config.model_validate({"model": {"lora": {"rank": 16}}})) == names[1]  # 16 is the default


def changed(section: BaseModel, path: list[str]) -> Any:
    """The section with one other value."""
    name, rest = path[0], path[1:]
    value = getattr(section, name)
    if rest:
        return section.model_copy(update={name: changed(value, rest)})
    match value:
        case bool():
            other: Any = not value
        case int() | float():
            other = value + 1
        case tuple():
            other = (*value, "more")
        case dict():
            other = {"my.reward": 1.0}
        case None:
            other = 7
        case _:
            other = f"{value}x"
    return section.model_copy(update={name: other})


def test_every_setting_is_part_of_the_name() -> None:
    config = Config(model=ModelConfig(lora=LoraConfig(rank=4)), eval_judge=JudgeConfig())
    paths = [path for path in leaves(config.model_dump(mode="json")) if path != "output_dir"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these values no validation would let pass
        names = {path: settings_hash(changed(config, path.split("."))) for path in paths}
    assert len({*names.values(), settings_hash(config)}) == len(paths) + 1 > 100
    assert settings_hash(config.model_copy(update={"output_dir": "elsewhere"})) == settings_hash(config)


def test_results_of_another_default_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    path, output = write(tmp_path / "tiny.yaml", given), tmp_path / "study"
    recipe = read_recipe(path, output)
    store(recipe, OUTCOMES)
    cell = next(cell for cell in recipe.cells if cell.arm.name == "grpo")
    run, results = cell.folder / "config.resolved.json", cell.tests[0].folder / "results.json"
    made, answered = cell.config.model_dump(mode="json"), json.loads(results.read_text())

    def record(train: dict[str, Any], test: dict[str, Any]) -> None:
        run.write_text(json.dumps(made | train))
        results.write_text(json.dumps(answered | {"config": cell.tests[0].config.model_dump(mode="json") | test}))

    record({"output_dir": "moved", "gone": 1}, {"output_dir": "moved"})
    read_recipe(path, output)
    record({"eval": made["eval"] | {"seed": 5}}, {})  # how it is tested has no part in its training
    read_recipe(path, output)
    record({"loss": {"type": "grpo"}}, {})  # the settings that came later were not there
    read_recipe(path, output)
    record({"loss": made["loss"] | {"beta": 0.5}}, {})
    message = r"grpo, seed 0 in .*grpo.seed0-\w+ was made with loss\.beta = 0\.5, but it is now 0\.04 \(the default"
    with pytest.raises(ValueError, match=message):
        read_recipe(path, output)
    record({"network": "[" * 2000}, {})
    with pytest.raises(ValueError, match=r"was made with network = .{200}\.\.\., but it is now"):
        read_recipe(path, output)
    record({}, {"eval": cell.tests[0].config.eval.model_dump(mode="json") | {"temperature": 0.5}})
    message = r"grpo, seed 0, test home in .*home-\w+ was made with eval\.temperature = 0\.5, but it is now 1\.0"
    with pytest.raises(ValueError, match=message):
        read_recipe(path, output)
