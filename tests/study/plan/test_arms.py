"""Arms that start from other arms: their order, weights and names, and invalid recipes.

Run: pytest tests/study/plan/test_arms.py
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cells import store, write
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from medvqa_rl.study import running
from medvqa_rl.study.collect import collect
from medvqa_rl.study.plan.recipe import Recipe, read_recipe
from medvqa_rl.study.running import forecast, is_finished, plan_table, run_study
from tests import forking

QUIET = Console(quiet=True)


@pytest.fixture
def staged(given: dict[str, Any]) -> dict[str, Any]:
    """The small recipe in two stages; dependents are listed before their start."""
    given["arms"] = {
        "as_is": {"verb": "none", "from": "warm_up"},
        "grpo": {"verb": "train", "from": "warm_up"},
        "warm_up": {
            "verb": "sft",
            "once": True,
            "settings": {"data": {"scanner": "unseen"}, "optimizer": {"learning_rate": 1e-2}},
        },
        "alone": {"verb": "sft"},
    }
    given["tests"]["far"] = {"data": {"scanner": "unseen", "num_test": 6}}
    given["forecast"]["seconds_per_start"] = 7
    return given


def labels(recipe: Recipe) -> list[str]:
    return [cell.label for cell in recipe.cells]


def file_of(command: Sequence[str]) -> str:
    """Name of the settings file in a command."""
    return next(Path(word).name for word in command if word.endswith(".yaml"))


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest absolute difference between two sets of weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_starts_are_trained_first_and_once(
    staged: dict[str, Any], in_process: list[list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "study"
    recipe = read_recipe(write(tmp_path / "tiny.yaml", staged), output)
    assert labels(recipe) == ["as_is", "grpo, seed 0", "grpo, seed 1", "warm_up", "alone, seed 0", "alone, seed 1"]
    as_is, grpo, _, warm_up, *_ = recipe.cells
    assert [cell.start for cell in recipe.cells] == [warm_up, warm_up, warm_up, None, None, None]
    table = plan_table(recipe)
    assert table.header[1] == "from" and [row[1] for row in table.rows] == ["warm_up"] * 3 + [""] * 3
    # Training data differ between arms; tests do not.
    assert [cell.config.data.scanner for cell in recipe.cells] == ["home", "home", "home", "unseen", "home", "home"]
    assert {cell.tests[0].config.data for cell in recipe.cells} == {grpo.tests[0].config.data}

    # One process start for training, one for the tests; four steps at 60 s and 30 s, four questions each at 15 s.
    assert [left - 8 * 15 for left in list(forecast(recipe).values())[:4]] == [7, 14 + 240, 14 + 240, 14 + 120]

    assert run_study(recipe, output, console=QUIET) == []
    verbs = ["sft", "study", *["sft", "study"] * 2, "study", *["train", "study"] * 2]
    assert [words[0] for words in in_process] == verbs
    assert all(map(is_finished, recipe.cells))
    assert grpo.config.model.path == str(warm_up.checkpoint) and str(warm_up.folder) in grpo.config.model.path
    folders = [Path(staged["settings"]["model"]["path"]), warm_up.checkpoint, grpo.checkpoint]
    before, began, ended = (load_file(folder / "model.safetensors") for folder in folders if folder)
    assert distance(before, began) > 1e-2 and distance(began, ended) < 1e-4  # four steps at 1e-2, four at 1e-6
    for place, scanner in enumerate(("home", "unseen")):
        results = json.loads((grpo.tests[place].folder / "results.json").read_text())
        assert results["dataset"]["name"] == f"phantom/{scanner}/test"
    answers = [(cell.tests[0].folder / "samples.jsonl").read_text() for cell in (as_is, warm_up)]
    assert answers[0] == answers[1]  # as it is: the start's own answers

    in_process.clear()
    staged["arms"]["warm_up"]["settings"]["optimizer"] = {"learning_rate": 1e-3}
    changed = read_recipe(write(tmp_path / "tiny.yaml", staged), output)
    assert [is_finished(cell) for cell in changed.cells] == [False] * 4 + [True] * 2
    assert {cell.folder for cell in changed.cells[:4]}.isdisjoint(cell.folder for cell in recipe.cells)
    assert changed.cells[0].tests[0].folder.name != as_is.tests[0].folder.name


def test_cells_start_from_the_same_seed(staged: dict[str, Any], tmp_path: Path) -> None:
    staged["arms"]["warm_up"].pop("once")
    staged["arms"]["later"] = {"verb": "train", "from": "grpo"}
    recipe = read_recipe(write(tmp_path / "tiny.yaml", staged), tmp_path)
    starts = {cell.label: [start.label for start in cell.starts] for cell in recipe.cells}
    assert starts["later, seed 1"] == ["grpo, seed 1", "warm_up, seed 1"]
    assert starts["as_is, seed 1"] == ["warm_up, seed 1"]
    only = read_recipe(tmp_path / "tiny.yaml", tmp_path, only=["later"])
    assert {cell.arm.name for cell in only.cells} == {"later", "grpo", "warm_up"}
    assert [cell.folder for cell in only.cells] == [
        cell.folder for cell in recipe.cells if cell.arm.name not in ("as_is", "alone")
    ]


def test_a_lora_start_is_loaded_as_an_adapter(staged: dict[str, Any], tmp_path: Path) -> None:
    staged["arms"]["warm_up"]["settings"]["model"] = {"lora": {"rank": 4}}
    recipe = read_recipe(write(tmp_path / "tiny.yaml", staged), tmp_path)
    _, grpo, _, warm_up, *_ = recipe.cells
    base = staged["settings"]["model"]["path"]
    assert (grpo.config.model.path, grpo.config.model.adapter) == (base, str(warm_up.checkpoint))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_start_stops_only_its_dependents(
    staged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", staged), tmp_path / "study")
    called: list[str] = []

    def call(command: Sequence[str], **rest: Any) -> int:
        called.append(file_of(command))
        return int(called[-1].startswith("warm_up"))

    monkeypatch.setattr(running.subprocess, "call", call)
    failures = run_study(recipe, tmp_path / "study", jobs=jobs, console=QUIET)
    told = {failure.cell.label: failure.last_line for failure in failures}
    assert told.keys() == {"warm_up", "as_is", "grpo, seed 0", "grpo, seed 1"}
    assert told["grpo, seed 1"] == "not started, because training of warm_up, which it starts from, failed"
    assert {name.split("-")[0] for name in called} == {"warm_up", "alone"}


def test_jobs_wait_for_a_start_but_not_for_its_tests(
    staged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start's test ends only after a cell that starts from it has begun."""
    staged["arms"].pop("alone")
    recipe = read_recipe(write(tmp_path / "tiny.yaml", staged), tmp_path / "study")
    began, order, lock = threading.Event(), list[str](), threading.Lock()
    warm_up = next(cell for cell in recipe.cells if cell.arm.name == "warm_up")

    def call(command: Sequence[str], **rest: Any) -> int:
        verb, name = command[3], file_of(command)
        with lock:
            order.append(f"{verb} {name.split('-')[0]}")
        if verb == "sft":
            warm_up.folder.mkdir(parents=True)
            (warm_up.folder / "status.json").write_text(json.dumps({"state": "finished", "step": 4}))
        elif name.startswith("warm_up"):
            assert began.wait(timeout=30)
        else:
            began.set()
        return 0

    monkeypatch.setattr(running.subprocess, "call", call)
    assert run_study(recipe, tmp_path / "study", jobs=2, console=QUIET) == []
    assert order[0] == "sft warm_up" and set(order[1:3]) == {"study warm_up", "study as_is"}


def test_answer_refuses_other_files(tmp_path: Path) -> None:
    path = write(tmp_path / "tests.yaml", {"tests": {"a": {}}})
    command = [sys.executable, "-m", "medvqa_rl", "study", "answer", str(path)]
    found = forking.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "must have the keys checkpoint and tests" in " ".join(found.stderr.split())


def test_an_arm_can_have_the_first_seeds_only(staged: dict[str, Any], tmp_path: Path) -> None:
    staged["seeds"] = [4, 7, 9]
    staged["arms"]["alone"]["seeds"] = 2
    staged["arms"]["after"] = {"verb": "none", "from": "alone", "seeds": 1}
    path = write(tmp_path / "staged.yaml", staged)
    recipe = read_recipe(path, tmp_path / "study")
    assert {name: [cell.seed for cell in recipe.cells if cell.arm.name == name] for name in staged["arms"]} == {
        "as_is": [4],
        "grpo": [4, 7, 9],
        "warm_up": [4],
        "alone": [4, 7],
        "after": [4],
    }
    assert labels(recipe)[-1] == "after, seed 4", "it belongs to a seed of its start"
    assert recipe.cells[-1].checkpoint == next(c for c in recipe.cells if c.label == "alone, seed 4").checkpoint
    quick = read_recipe(path, tmp_path / "study", quick=True)
    assert [cell.seed for cell in quick.cells if cell.arm.name == "alone"] == [0]


def test_an_arm_trained_once_is_compared_with_every_seed(staged: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", staged), tmp_path / "study")
    store(recipe, {("warm_up", 0): "100000", ("grpo", 0): "111000", ("grpo", 1): "111110"})
    arms = {arm.name: arm for arm in collect(recipe).tests["home"]}
    assert [test.seed for test in arms["warm_up"].tests] == [0, 1]
    gain = arms["warm_up"].gain
    assert gain is not None and gain.estimate == pytest.approx(1 / 6 - (3 / 6 + 5 / 6) / 2)


def test_training_images_of_a_start_are_leaks_too(staged: dict[str, Any], tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (28, 28)).save(tmp_path / f"{name}.png")
    rows = [("1", "a", "train"), ("2", "b", "val"), ("3", "a", "test")]
    lines = [
        json.dumps({"id": id, "image": f"{image}.png", "question": f"Is it {id}?", "answer": "yes", "split": split})
        for id, image, split in rows
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    own = {"name": "own", "path": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "answer_types": ["closed"]}
    staged["arms"]["warm_up"]["settings"]["data"] = own
    staged["arms"].pop("alone")
    staged["tests"] = {"mine": {"data": own}}
    with pytest.raises(ValueError, match=r"The test set mine .* with the training set of warm_up .*a\.png"):
        read_recipe(write(tmp_path / "tiny.yaml", staged), tmp_path / "study")


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (
            {"grpo": {"verb": "train", "from": "warmup"}},
            r"arm grpo, under from, has the unknown arm 'warmup': use one of .*: did you mean warm_up\?",
        ),
        ({"grpo": {"verb": "train", "from": ["warm_up"]}}, r"has from \['warm_up'\], but must name one arm"),
        ({"grpo": {"verb": "train", "from": "as_is"}}, r"has from 'as_is', but that arm is not trained \(verb none\)"),
        ({"grpo": {"verb": "train", "from": "grpo"}}, r"start from each other \(grpo from grpo\), so none"),
        (
            {"warm_up": {"verb": "sft", "from": "grpo"}},
            r"start from each other \(as_is from warm_up from grpo from warm_up\), so none can be trained first",
        ),
        (
            {"grpo": {"verb": "train", "from": "warm_up", "settings": {"model": {"path": "phantom:base"}}}},
            r"has both from 'warm_up' and model\.path, but can start from one model",
        ),
        ({"warm_up": {"verb": "sft", "once": 1}}, "has once 1, but must have true"),
        ({"alone": {"verb": "sft", "seeds": 0}}, "has seeds 0, but must have the number of the study's seeds"),
        ({"alone": {"verb": "sft", "seeds": 1, "once": True}}, "at least 1, and no once"),
        (
            {"alone": {"verb": "sft", "seeds": 1}, "after": {"verb": "train", "from": "alone"}},
            "starts from alone, which is trained with 1 seed only: give it seeds: 1, or fewer",
        ),
        (
            {"grpo": {"verb": "train", "form": "warm_up"}},
            "arm grpo, has the unknown key 'form': use one of .*: did you mean from",
        ),
    ],
)
def test_invalid_starts_are_refused(
    staged: dict[str, Any], tmp_path: Path, arms: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(write(tmp_path / "tiny.yaml", staged | {"arms": staged["arms"] | arms}), tmp_path)
    assert "\n" not in str(error.value)
