"""The output of `study collect`: numbers computed by hand, and texts that try to be markup.

Run: pytest tests/study/test_output.py
"""

from __future__ import annotations

import csv
import html
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from cells import OUTCOMES, records_of, store, write
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.study import figures
from medvqa_rl.study.collect import Collected, collect
from medvqa_rl.study.findings import correlations, course, ends, longest_wrong
from medvqa_rl.study.output import MAX_SHOWN, _answer_lines, _shortened, write_study
from medvqa_rl.study.plan.recipe import Cell, Recipe, read_recipe
from medvqa_rl.study.signs import cut_off_on_test, perplexity_on_test, thinking_on_test, verbose_on_test
from medvqa_rl.study.tables import factor_cells, factor_rows, rows
from tests.records import make_record

EVIL = "</pre><script>document.title='owned'</script>\n````\n# heading | cell\n![x](http://example.com/x.png)"
TABLES = [
    {
        "title": "Supervision",
        "arms": ["sft", "grpo"],
        "metrics": ["accuracy", "similarity", "length"],
        "published": {
            "sft": {"accuracy": {"value": 52.0, "change": -6.04, "certain": ["change"]}, "length": {"change": 273}},
            "grpo": {"accuracy": {"value": 58.04}},
        },
        "note": "Which one is not known.",
    }
]


def varied(cell: Cell, record: EvalRecord) -> EvalRecord:
    """Answers with markup, whose length identifies cell and question."""
    number = int(record.sample_id)
    tokens = 10 * (number + 1) + cell.seed + (5 if cell.arm.name == "sft" else 0)
    text = f"{EVIL} {cell.label} {number}"
    return replace(record, num_tokens=tokens + 3, output=text, question=f"Is it {number} <b>?")


def curve(cell: Cell) -> list[dict[str, Any]]:
    """Forty steps; supervised arms have a loss only."""
    if cell.arm.verb == "sft":
        return [{"step": step, "step_time": 2.0, "loss": 1 / step} for step in range(1, 41)]
    return [
        {
            "step": step,
            "step_time": 2.0,
            "reward": 0.02 * step + 0.1 * cell.seed,
            "rewards/correctness/mean": 0.01 * step,
            "rewards/ecr/mean": 0.5,
            "rewards/ecr/corr_correctness": None if step % 2 else (-0.5 if step <= 20 else 0.3 + 0.1 * cell.seed),
            "completions/mean_length": 30.0,
        }
        for step in range(1, 41)
    ]


@pytest.fixture
def recipe(given: dict[str, Any], tmp_path: Path) -> Recipe:
    given["tests"] = {"far": {"data": {"scanner": "unseen", "num_test": 6}}, **given["tests"]}
    given |= {"primary": "home", "tables": TABLES, "note": "another model"}
    return read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")


@pytest.fixture
def collected(recipe: Recipe) -> Collected:
    store(recipe, OUTCOMES, change=varied, rows=curve)
    return collect(recipe)


def lines(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_published_figures_appear_in_the_primary_table_only(collected: Collected, tmp_path: Path) -> None:
    assert [arm.published for arm in collected.tests["home"]] == [None, 52.0, 58.04]
    assert {arm.published for arm in collected.tests["far"]} == {None}
    write_study(collected, tmp_path / "tables")
    heads = {name: (tmp_path / "tables" / f"{name}.csv").read_text().splitlines()[0] for name in ("home", "far")}
    assert "published" in heads["home"] and "published" not in heads["far"]
    assert collected.recipe.primary == "home"


def test_the_first_test_is_primary_by_default(given: dict[str, Any], tmp_path: Path) -> None:
    given["tests"] = {"far": {"data": {"scanner": "unseen"}}, **given["tests"]}
    assert read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path).primary == "far"
    with pytest.raises(ValueError, match="has primary 'near', but must name one of its tests: far, home"):
        read_recipe(write(tmp_path / "tiny.yaml", given | {"primary": "near"}), tmp_path)


def test_budgets_are_completions_and_optimizer_steps(given: dict[str, Any], tmp_path: Path) -> None:
    given["arms"]["grpo"]["settings"]["loss"] = {"num_iterations": 3}
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    store(recipe, OUTCOMES)
    titles, body = rows(collect(recipe).tests["home"], "grpo")
    table = {row[0]: dict(zip(titles, row)) for row in body}
    # 4 steps of 2 prompts with 2 completions, each step in three passes; 4 steps of 2 references.
    shown = {name: (row["completions"], row["optimizer steps"]) for name, row in table.items()}
    assert shown == {"zero_shot": ("", ""), "sft": ("8", "4"), "grpo": ("16", "12")}


def test_a_papers_table_follows_the_recipe(collected: Collected, tmp_path: Path) -> None:
    (table,) = collected.recipe.tables
    arms = collected.tests["home"]
    found = {(cell.arm, cell.metric): cell for cell in factor_cells(table, arms, "grpo")}
    assert list(found) == [(arm, metric) for arm in ("sft", "grpo") for metric in ("accuracy", "similarity", "length")]
    gain = next(arm.gain for arm in arms if arm.name == "sft")
    assert gain is not None
    accuracy = found["sft", "accuracy"]
    assert (accuracy.ours, accuracy.change) == (pytest.approx(55.0), pytest.approx(-35.0))
    assert accuracy.interval == (100 * gain.low, 100 * gain.high)
    # Ten shared questions and one unscored in the zero-shot arm: lengths cover all scored questions of a cell.
    tokens = [10 * (number + 1) + 5 + seed + 3 for number in range(11) for seed in (0, 1)]
    assert found["sft", "length"].ours == pytest.approx(mean(tokens))
    assert found["sft", "length"].change == pytest.approx(5.0) and math.isnan(found["grpo", "length"].change)
    # The two similarities come from different instruments: no difference, and a column for each.
    assert math.isnan(found["sft", "similarity"].change)
    titles, (sft, grpo) = factor_rows(list(found.values()))
    row = dict(zip(titles, sft))
    assert row["accuracy, % (published, other data and model)"] == "52* (-6.04)"
    assert row["length, tokens (published, other data and model)"] == "(+273*)"
    assert (row["similarity (other)"], row["similarity (tfidf)"]) == ("0.50", "")
    assert dict(zip(titles, grpo))["accuracy, % (published, other data and model)"] == "58.04*"
    assert row["accuracy, %"].startswith("55.0 (-35.0, ")
    write_study(collected, tmp_path / "tables")
    tidy = {(line["arm"], line["metric"]): line for line in lines(tmp_path / "tables" / "factor-supervision.csv")}
    assert tidy["sft", "accuracy"] | {"low": "", "high": ""} == {
        **{"arm": "sft", "metric": "accuracy", "by": "", "ours": "55", "change": "-35", "low": "", "high": ""},
        **{"published": "52", "published_change": "-6.04", "certain": "change"},
    }
    text = (tmp_path / "tables" / "study.md").read_text()
    assert "### Supervision (home)" in text and "Which one is not known." in text and "* reported by secondary" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arms": ["sft", "gpro"]},
            "table 1, has the unknown arm 'gpro': use one of zero_shot, sft, grpo: did you mean",
        ),
        ({"metrics": ["acuracy"]}, "has the unknown metric 'acuracy': use one of accuracy, .*: did you mean accuracy"),
        (
            {"published": {"zero_shot": {"accuracy": {"value": 1}}}},
            "has the unknown arm 'zero_shot': use one of sft, grpo",
        ),
        (
            {"published": {"sft": {"perplexity": {"value": 1}}}},
            "has the unknown metric 'perplexity': use one of accuracy",
        ),
        ({"published": {"sft": {"accuracy": 52}}}, r"published\.sft\.accuracy is 52, but must have a number as value"),
        ({"published": {"sft": {"accuracy": {"value": "high"}}}}, "but must have a number as value"),
        ({"published": {"sft": {"accuracy": {"value": 1, "certain": ["change"]}}}}, "but must have a number as value"),
        ({"published": {"sft": {"accuracy": {"value": 1, "source": "x"}}}}, "but must have a number as value"),
        ({"published": ["sft"]}, "it must have a section of metrics per arm"),
        ({"title": ""}, "table 1, has no title"),
        ({"title": "---"}, "but files are named after it: give each table a unique title"),
        ({"arms": "sft"}, "has 'sft' as arms, but must have a list of names"),
        ({"metric": []}, "has the unknown key 'metric': use one of title, arms, metrics.*: did you mean metrics"),
    ],
)
def test_invalid_tables_are_refused(
    given: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given["tables"] = [TABLES[0] | change]
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"table 2, has the title 'Supervision', but files are named after it"):
        read_recipe(write(tmp_path / "tiny.yaml", given | {"tables": [TABLES[0], TABLES[0]]}), tmp_path)
    with pytest.raises(ValueError, match="as tables, but it must be a list"):
        read_recipe(write(tmp_path / "tiny.yaml", given | {"tables": {"one": 1}}), tmp_path)


# --- texts ---------------------------------------------------------------------------------------------------------


def test_the_longest_wrong_answers_come_first_and_once_per_question(collected: Collected) -> None:
    # sft is wrong at questions 0, 1, 5, 6, 10 with seed 0 and at 0, 3, 4, 5, 6 with seed 1, which is a token longer.
    shown = [(label, record.question, record.num_tokens) for label, record in collected.longest_wrong["sft"]]
    assert shown == [
        ("sft, seed 0", "Is it 10 <b>?", 118),
        ("sft, seed 1", "Is it 6 <b>?", 79),
        ("sft, seed 1", "Is it 5 <b>?", 69),
    ]
    assert [record.question for _, record in collected.longest_wrong["grpo"]] == [
        "Is it 10 <b>?",
        "Is it 6 <b>?",
        "Is it 4 <b>?",
    ]
    assert longest_wrong({"grpo": []}) == ()


def test_titles_and_notes_of_a_recipe_are_never_markup(given: dict[str, Any], tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)> [x](http://example.com/a) ![y](http://example.com/b.png)\n# heading"
    given |= {"title": f"title {evil}", "note": f"note {evil}"}
    given["tables"] = [{**TABLES[0], "title": f"table {evil}", "note": f"remark {evil}"}]
    given["tests"]["direct"] = given["tests"]["home"] | {"prompt": {"template": "direct"}}
    given["contrasts"] = [{"title": f"contrast {evil}", "of": "home", "minus": "direct"}]
    recipe = read_recipe(write(tmp_path / "recipe.yaml", given), tmp_path / "out")
    store(recipe, OUTCOMES)
    write_study(collect(recipe), tmp_path / "tables")
    page, text = ((tmp_path / "tables" / f"study.{kind}").read_text() for kind in ("html", "md"))
    for what in ("title", "note", "table", "remark", "contrast"):
        assert f"{what} &lt;img src=x onerror=alert(1)&gt; [x](http" in page
        assert f"{what} \\<img src=x onerror=alert(1)> [x]\\(http" in text
    assert "<img src=x" not in page and "](http" not in text and "\n# heading" not in text


@pytest.mark.parametrize("name", ["<b>", "a b", "../a", "a\n", "..", ""])
def test_names_of_arms_and_tests_hold_no_markup(given: dict[str, Any], name: str, tmp_path: Path) -> None:
    for section in ("arms", "tests"):
        changed = {**given, section: {**given[section], name: next(iter(given[section].values()))}}
        with pytest.raises(ValueError, match="names are made of letters, digits"):
            read_recipe(write(tmp_path / "recipe.yaml", changed), tmp_path / "out")


def test_model_outputs_are_never_markup(collected: Collected, tmp_path: Path) -> None:
    write_study(collected, tmp_path / "tables")
    page = (tmp_path / "tables" / "study.html").read_text()
    assert "<script" not in page and html.escape("</pre><script>", quote=False) in page
    assert "http://example.com" in page and 'src="http' not in page
    assert "Is it 10 &lt;b&gt;?" in page
    text = (tmp_path / "tables" / "study.md").read_text()
    outside = re.sub(r"^(`{5,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "# heading" in text and "# heading" not in outside and "example.com" not in outside


@settings(deadline=None)
@hypothesis_given(st.text(alphabet="`\n# a", max_size=60))
def test_no_text_closes_its_code_block(text: str) -> None:
    record = replace(records_of("0")[0], question=text, gold=text, output=text)
    block = "\n".join(_answer_lines({"arm": [_shortened("x", record)]})[2:])
    fence = re.match(r"`+", block)
    assert fence is not None
    end = re.compile(rf" {{0,3}}`{{{len(fence.group())},}}\s*")
    closing = [line for line in block.splitlines()[1:] if end.fullmatch(line)]
    assert len(closing) == 1


def test_long_texts_are_cut() -> None:
    record = replace(records_of("0")[0], output="a" * 5000, is_truncated=True)
    shown = "\n".join(_answer_lines({"arm": [_shortened("x", record)]}))
    assert (
        "a" * MAX_SHOWN + " ..." in shown
        and "a" * (MAX_SHOWN + 1) not in shown
        and "truncated at the token limit" in shown
    )


# --- signs ---------------------------------------------------------------------------------------------------------


def results(**changes: Any) -> dict[str, Any]:
    base = {
        "accuracy": 0.7,
        "lengths": {"total": {"right": {"mean": 20.0}, "wrong": {"mean": 22.0}, "all": {"mean": 21.0}}},
        "thinking": {"reward": 1.8},
        "perplexity": {"value": 2.0, "by": "phantom:lm"},
    }
    return base | changes


def lengths(right: float | None, wrong: float | None, every: float | None) -> dict[str, Any]:
    return {"total": {"right": {"mean": right}, "wrong": {"mean": wrong}, "all": {"mean": every}}}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "fine"),
        ({"lengths": lengths(20.0, 30.0, 22.0)}, "look"),  # wrong answers 1.5 times as long
        ({"lengths": lengths(20.0, 29.0, 22.0)}, "fine"),
        ({"lengths": lengths(31.5, 31.5, 31.5), "accuracy": 0.49}, "look"),  # 1.5 times the untrained, and worse
        ({"lengths": lengths(31.5, 31.5, 31.5), "accuracy": 0.51}, "fine"),
        ({"lengths": lengths(None, 22.0, 22.0), "accuracy": 0.0}, "fine"),
        ({"lengths": lengths(None, None, None)}, "not measured"),
    ],
)
def test_verbose_answers(changes: dict[str, Any], verdict: str) -> None:
    untrained = results(accuracy=0.5)
    assert verbose_on_test(results(**changes), [], untrained).verdict == verdict


def test_repetition_is_counted_in_wrong_answers_only() -> None:
    wrong = make_record(output="<think>a b c d a b c d</think>")
    right = replace(wrong, output="one two three four five", is_correct=True)
    # a b c d, b c d a, c d a b, d a b c, a b c d: one of five is a repeat.
    assert "wrong answers 20 % are repeats" in verbose_on_test(results(), [wrong, right], None).figure


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "fine"),
        ({"thinking": {"reward": 0.99}}, "look"),
        ({"thinking": {"reward": 0.99}, "accuracy": 0.59}, "fine"),
        ({"thinking": {"reward": 1.0}}, "fine"),
        ({"thinking": {"reward": None}}, "not measured"),
    ],
)
def test_thinking_against_accuracy(changes: dict[str, Any], verdict: str) -> None:
    assert thinking_on_test(results(**changes)).verdict == verdict


@pytest.mark.parametrize(
    ("value", "by", "verdict"),
    [
        (2.9, "phantom:lm", "fine"),
        (3.0, "phantom:lm", "look"),  # 1.5 times the untrained model's
        (3.0, "gpt2", "fine"),  # which another language model measured
        (30.1, "gpt2", "look"),
        (None, None, "not measured"),
    ],
)
def test_perplexity(value: float | None, by: str | None, verdict: str) -> None:
    found = results(perplexity={"value": value, "by": by})
    assert perplexity_on_test(found, results()).verdict == verdict
    if value == 3.0:
        assert perplexity_on_test(found, None).verdict == "fine"


@pytest.mark.parametrize(("share", "verdict"), [(0.0, "fine"), (0.099, "fine"), (0.1, "look"), (1.0, "look")])
def test_greedy_answers_that_are_cut_off(share: float, verdict: str) -> None:
    found = cut_off_on_test(results(truncated_rate=share))
    assert found.verdict == verdict and found.figure == f"{100 * share:.1f} % of the answers were cut off."


def test_every_trained_cell_is_checked_for_signs(collected: Collected, tmp_path: Path) -> None:
    assert {arm: list(cells) for arm, cells in collected.signs.items()} == {"sft": [0, 1], "grpo": [0, 1]}
    named = {check.name: check.verdict for check in collected.signs["grpo"][0]}
    assert named["No rise of the curve"] == "fine" and named["High perplexity"] == "not measured"
    write_study(collected, tmp_path / "tables")
    text = (tmp_path / "tables" / "study.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| grpo | ") and "not measured" in line]
    # No judge, no language model, and two curves that were not logged (KL, entropy).
    assert row.count("not measured") == 4


# --- correlations and figures --------------------------------------------------------------------------------------


def test_correlations_are_means_over_halves_of_the_run(collected: Collected) -> None:
    (part,) = collected.correlations["grpo"]
    assert part.part == "ecr" and part.first == pytest.approx((-0.5, -0.5)) and part.last == pytest.approx((0.3, 0.4))
    assert collected.correlations["sft"] == ()
    (constant,) = correlations([[{"step": 1.0}, {"step": 2.0, "rewards/x/corr_correctness": 0.5}]])
    assert math.isnan(constant.first[0]) and constant.last == (0.5,)


def test_ends_are_the_first_and_the_last_fifth_of_what_was_logged() -> None:
    assert ends([{"step": step, "entropy": float(step)} for step in range(10)], "entropy") == (0.5, 8.5)
    assert ends([{"step": 0, "entropy": 0.3}, {"step": 1}], "entropy") == (0.3, 0.3)
    assert all(map(math.isnan, ends([{"step": 0}], "entropy")))


def test_the_course_of_training_by_hand(collected: Collected, tmp_path: Path) -> None:
    """Fifths of the steps, means over seeds, and the worst seed for what went wrong."""
    steady = [{"step": float(s), "reward": 1.0, "entropy": 0.5, "completions/mean_length": 20.0} for s in range(1, 21)]
    falling = [row | {"reward": 2.0 - row["step"] / 20, "entropy": row["step"], "grad_norm": 0.1} for row in steady]
    falling[7]["grad_norm"] = 0.4
    found = course([steady, falling])
    # Steps 1 to 4 and 17 to 20: (0.5 + 2.5) / 2 and (0.5 + 18.5) / 2.
    assert found.entropy == (pytest.approx(1.5), pytest.approx(9.5)) and found.length == (20.0, 20.0)
    assert found.fall == pytest.approx(0.5), "means over ten steps fall from 1.725 to 1.225"
    assert found.spike == pytest.approx(4.0)
    short = course([[{"step": 1.0, "reward": 1.0}]])
    assert math.isnan(short.fall) and math.isnan(short.spike) and math.isnan(short.entropy[0])
    write_study(collected, tmp_path / "tables")
    header, *rows = (tmp_path / "tables/training.csv").read_text().splitlines()
    assert header.startswith('arm,"entropy, first"') and [row.split(",")[0] for row in rows] == ["grpo"]
    assert "### Course of training" in (tmp_path / "tables/study.md").read_text()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Collect figures instead of writing files."""
    kept: list[Figure] = []

    def keep(figure: Figure, path: Path) -> Path:
        kept.append(figure)
        return path

    monkeypatch.setattr(figures, "save_figure", keep)
    yield kept


def points(figure: Figure, place: int) -> list[tuple[list[float], list[float]]]:
    axes = figure.axes[place]
    return [(np.ravel(line.get_xdata()).tolist(), np.ravel(line.get_ydata()).tolist()) for line in axes.get_lines()]


def test_accuracies_are_drawn_with_every_seed(collected: Collected, drawn: list[Figure], tmp_path: Path) -> None:
    figures.plot_accuracy(collected, tmp_path / "x.png")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["far, 10 questions", "home, 10 questions"]
    marks = points(drawn[0], 1)
    arms = {arm.name: arm for arm in collected.tests["home"]}
    for height, name in enumerate(("zero_shot", "sft", "grpo")):
        assert ([100 * arms[name].accuracy.estimate], [height]) in marks
    seeds = [x for x, y in marks if len(x) == 2 and y == [1.27, 1.27]]
    assert seeds == [[pytest.approx(60.0), pytest.approx(50.0)]]
    segments = [path.vertices[:, 0].tolist() for lines in drawn[0].axes[1].collections for path in lines.get_paths()]
    assert [100 * arms["sft"].accuracy.low, 100 * arms["sft"].accuracy.high] in segments


def test_many_tests_are_drawn_in_several_rows(collected: Collected, drawn: list[Figure], tmp_path: Path) -> None:
    tests = {f"test{number}": collected.tests["home"] for number in range(5)}
    figures.plot_accuracy(replace(collected, tests=tests), tmp_path / "x.png")
    assert [axes.get_title(loc="left").split(",")[0] for axes in drawn[0].axes] == list(tests)
    places = [(axes.get_subplotspec().rowspan.start, axes.get_subplotspec().colspan.start) for axes in drawn[0].axes]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_curves_are_those_of_the_log(collected: Collected, drawn: list[Figure], tmp_path: Path) -> None:
    figures.plot_curves(collected, tmp_path / "x.png")
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes[:4]]
    assert titles == ["Reward", "Correct", "Completion, tokens", "Well-formed"]
    first, second, thick = points(drawn[0], 4)  # the second row is grpo's; windows of 2 of 40 steps
    inside = slice(1, 39)
    assert first[0] == list(range(1, 41))
    assert first[1][inside] == pytest.approx([0.02 * step for step in range(2, 40)])
    assert second[1][inside] == pytest.approx([0.02 * step + 0.1 for step in range(2, 40)])
    assert thick[1][inside] == pytest.approx([0.02 * step + 0.05 for step in range(2, 40)])
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["loss"]
    assert [text.get_text() for text in drawn[0].axes[1].texts] == ["not logged"]


def test_lengths_are_drawn_against_accuracies(collected: Collected, drawn: list[Figure], tmp_path: Path) -> None:
    figures.plot_lengths(collected, tmp_path / "x.png")
    marks = [(x[0], y[0]) for x, y in points(drawn[0], 0) if len(x) == 1]
    expected = [
        (mean(10 * (n + 1) + seed + offset + 3 for n in range(11)), accuracy)
        for offset, accuracies in ((5, (60.0, 50.0)), (0, (90.0, 90.0)))
        for seed, accuracy in enumerate(accuracies)
    ]
    for point in expected:
        assert any(mark == pytest.approx(point) for mark in marks)


def test_files_of_both_themes_are_images(collected: Collected, tmp_path: Path) -> None:
    written = write_study(collected, tmp_path / "tables")
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == 8 and len({path.read_bytes() for path in pictures}) == 8
    for path in pictures:
        with Image.open(path) as image:
            dark = sum(image.convert("RGB").getpixel((0, 0))) < 300  # type: ignore[arg-type]
            assert dark == path.stem.endswith("-dark") and len(image.convert("RGB").getcolors(1 << 24)) > 10
    page = (tmp_path / "tables" / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 8 and json.dumps("img-src data:")[1:-1] in page
