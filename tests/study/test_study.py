"""Studies of tiny runs: planned, run, killed and continued, changed; and their tables against independent numbers.

Run: pytest tests/study/test_study.py
"""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cells import OUTCOMES, store, write
from rich.console import Console
from scipy.stats import binomtest

from medvqa_rl.evaluation.statistics.stats import holm
from medvqa_rl.study import running
from medvqa_rl.study.collect import collect
from medvqa_rl.study.output import write_study
from medvqa_rl.study.plan.recipe import find_recipe, read_recipe
from medvqa_rl.study.running import forecast, is_finished, plan_table, run_study

QUIET = Console(quiet=True)


def test_a_quick_study_runs_once_and_only_what_changed_runs_again(
    given: dict[str, Any], in_process: list[list[str]], tmp_path: Path
) -> None:
    path, output = write(tmp_path / "tiny.yaml", given), tmp_path / "study"
    recipe = read_recipe(path, output, quick=True)
    assert [cell.label for cell in recipe.cells] == ["zero_shot", "sft, seed 0", "grpo, seed 0"]
    # Four questions each at 15 s, and two steps at 30 s and at 60 s.
    assert list(forecast(recipe).values()) == [60.0, 120.0, 180.0]
    assert run_study(recipe, output, console=QUIET) == []
    assert [words[0] for words in in_process] == ["study", "sft", "study", "train", "study"]
    assert all(map(is_finished, recipe.cells)) and sum(forecast(recipe).values()) == 0
    for cell in recipe.cells[1:]:
        assert json.loads((cell.folder / "status.json").read_text())["state"] == "finished"
        results = json.loads((cell.tests[0].folder / "results.json").read_text())
        assert results["model"]["path"].endswith("step_000002") and results["n"] == 4
    in_process.clear()
    assert run_study(read_recipe(path, output, quick=True), output, console=QUIET) == [] and in_process == []

    given["arms"]["grpo"]["settings"]["rewards"]["ecr"] = 1.0
    changed = read_recipe(write(path, given), output, quick=True)
    assert [is_finished(cell) for cell in changed.cells] == [True, True, False]
    assert run_study(changed, output, console=QUIET) == []
    assert [words[0] for words in in_process] == ["train", "study"]
    assert len(list((output / "grpo").glob("seed0-*"))) == 2 + 2  # two folders, and the log of each

    in_process.clear()
    given["settings"]["eval"]["similarity"] = "tfidf"  # another instrument: nothing is trained again
    measured = read_recipe(write(path, given), output, quick=True)
    assert [cell.folder for cell in measured.cells] == [cell.folder for cell in changed.cells]
    assert run_study(measured, output, console=QUIET) == []
    assert [words[0] for words in in_process] == ["study"] * 3

    written = write_study(collect(changed), output / "tables")
    files = {file.name: file.read_text() for file in written if file.suffix != ".png"}
    assert set(files) == {"home.csv", "home.tex", "study.md", "study.html"}
    table = list(csv.DictReader(files["home.csv"].splitlines()))
    assert [row["arm"] for row in table] == ["zero_shot", "sft", "grpo"]
    assert [row["published, other data and model"] for row in table] == ["", "52", "58.04"]
    assert (
        "| zero_shot |" in files["study.md"]
        and "\\toprule" in files["home.tex"]
        and "<td>sft</td>" in files["study.html"]
    )


def test_a_killed_cell_continues(
    given: dict[str, Any], in_process: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given["arms"] = {"grpo": given["arms"]["grpo"]}
    given["seeds"] = [0]
    output = tmp_path / "study"
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), output)
    (cell,) = recipe.cells
    called = in_process

    def killed(command: Sequence[str], **rest: Any) -> int:
        process = subprocess.Popen(command, **rest)
        while not list(cell.folder.glob("checkpoints/step_*")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        return process.wait()

    with monkeypatch.context() as patch:
        patch.setattr(running.subprocess, "call", killed)
        (failure,) = run_study(recipe, output, console=QUIET)
    assert failure.cell is cell and failure.code == -signal.SIGKILL and not is_finished(cell)
    assert "started" in list(plan_table(recipe).columns[4].cells)
    assert run_study(recipe, output, console=QUIET) == []
    assert called[0][0] == "train" and called[0][-1] == "--resume"
    rows = [json.loads(line) for line in (cell.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert is_finished(cell)


def test_several_processes_share_a_cell(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study", only=["zero_shot"])
    called: list[list[str]] = []
    monkeypatch.setattr(running.subprocess, "call", lambda command, **rest: called.append(list(command)) or 0)
    run_study(recipe, tmp_path / "study", processes=4, console=QUIET)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "4", "-m", "medvqa_rl"]
    assert [command[:7] for command in called] == [launch] * len(called)
    assert [command[7] for command in called[:2]] == ["study", "train"]
    with pytest.raises(ValueError, match="would take the same 4 GPUs: leave one of the two at 1"):
        run_study(recipe, tmp_path / "study", jobs=2, processes=4, console=QUIET)


def test_a_study_that_is_running_is_left_alone(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    (tmp_path / "study").mkdir()
    with running.FileLock(tmp_path / "study" / ".study.lock"), pytest.raises(ValueError, match="by another process"):
        run_study(recipe, tmp_path / "study", console=QUIET)


# --- what is wrong with a recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "gpro"}, "has baseline 'gpro', but must name one of its arms: zero_shot, sft, grpo"),
        ({"baseline": ["grpo"]}, "must name one of its arms"),
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
def test_what_is_wrong_is_said_before_anything_starts(
    given: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path / "tiny.yaml", given | change), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_unknown_arms_and_recipes_are_sentences(given: dict[str, Any], tmp_path: Path) -> None:
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
def test_shipped_recipes_are_sound_and_fit_their_budget(quick: bool, limit: float, tmp_path: Path) -> None:
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


# --- tables --------------------------------------------------------------------------------------------------------


def test_equal_answers_say_nothing_of_what_would_be_found(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    store(recipe, OUTCOMES | {("sft", seed): OUTCOMES["grpo", seed] for seed in (0, 1)})
    arms = {arm.name: arm for arm in collect(recipe).tests["home"]}
    assert arms["sft"].gain is not None and arms["sft"].gain.estimate == 0
    assert math.isnan(arms["sft"].detectable) and arms["zero_shot"].detectable > 0


def test_tables_agree_with_scipy_and_hand(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    store(recipe, OUTCOMES)
    arms = {arm.name: arm for arm in collect(recipe).tests["home"]}
    assert arms["sft"].num_questions == 10 and arms["sft"].num_clusters == 5  # one is unscored somewhere
    assert arms["grpo"].accuracies == (0.9, 0.9) and arms["zero_shot"].accuracies == (0.2,)
    assert arms["grpo"].gain is None and arms["grpo"].tests == ()
    gain = arms["sft"].gain
    assert gain is not None and gain.estimate == pytest.approx((0.6 - 0.9 + 0.5 - 0.9) / 2)
    assert gain.low <= gain.estimate <= gain.high and arms["sft"].detectable == pytest.approx(
        2.8016 * gain.standard_error, rel=1e-3
    )
    raw: dict[str, dict[int, float]] = {}
    for name in ("zero_shot", "sft"):
        for seed in (0, 1):
            before, after = OUTCOMES["grpo", seed], OUTCOMES[name, 0 if name == "zero_shot" else seed]
            pairs = list(zip(before, after))[:10]
            better, worse = pairs.count(("0", "1")), pairs.count(("1", "0"))
            raw.setdefault(name, {})[seed] = binomtest(better, better + worse).pvalue
    for seed in (0, 1):
        adjusted = holm({name: found[seed] for name, found in raw.items()})
        for name in raw:
            (test,) = [test for test in arms[name].tests if test.seed == seed]
            assert test.mcnemar.p_value == pytest.approx(raw[name][seed])
            assert test.holm_p == pytest.approx(adjusted[name])
    assert raw["zero_shot"][0] < 0.05
    text = write_study(collect(recipe), tmp_path / "tables")[0].read_text()
    (head, *body) = list(csv.reader(text.splitlines()))
    columns = {row[0]: dict(zip(head, row)) for row in body}
    assert columns["grpo"]["seeds"] == "90.0, 90.0" and columns["sft"]["minus grpo"] == "-35.0"
    # Similarities of two instruments never share a column.
    assert (columns["grpo"]["similarity (tfidf)"], columns["grpo"]["similarity (other)"]) == ("0.50", "")
    assert (columns["sft"]["similarity (tfidf)"], columns["sft"]["similarity (other)"]) == ("", "0.50")


def test_what_is_not_finished_is_told_and_left_out(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    with pytest.raises(ValueError, match="No cell of the baseline grpo is finished"):
        collect(recipe)
    store(recipe, {key: flags for key, flags in OUTCOMES.items() if key not in (("sft", 1), ("zero_shot", 0))})
    collected = collect(recipe)
    assert collected.missing == ("zero_shot", "sft, seed 1")
    (sft,) = [arm for arm in collected.tests["home"] if arm.name == "sft"]
    assert sft.accuracies == (6 / 11,)
    assert [test.seed for test in sft.tests] == [0]
    # A measured step takes 2 s: four steps of sft and four questions at 15 s.
    assert forecast(recipe)[str(recipe.cells[2].folder)] == 4 * 2.0 + 4 * 15


def test_the_verbs_of_the_command(given: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.yaml", given)
    command = [sys.executable, "-m", "medvqa_rl", "study"]
    shown = subprocess.run(
        [*command, "plan", str(path), "train.steps=3", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "0/3" in shown.stdout and "minutes are left" in shown.stdout and not (tmp_path / "out").exists()
    wrong = subprocess.run(
        [*command, "run", str(path), "--arms", "drgrpo"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (
        wrong.returncode == 2 and "has the unknown arm 'drgrpo'" in wrong.stderr and wrong.stderr.count("error:") == 1
    )
