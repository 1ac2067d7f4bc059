"""The blinded sheet: what is on it, what must not be, and that its items are those of its key.

Run: pytest tests/report/pages/test_rating_sheet.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from synthetic import write, write_evaluation

from medvqa_rl.cli.judge.rate import run_ratings, run_sheet
from medvqa_rl.evaluation.judging.ratings import read_key
from medvqa_rl.evaluation.records import read_records
from medvqa_rl.evaluation.statistics.compare import Evaluated
from medvqa_rl.report.pages.images import samples_of_records
from medvqa_rl.report.pages.rating_sheet import choose_items


def data_of(sheet: Path) -> dict[str, Any]:
    text = sheet.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0]
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sheet")
    one, two = (write_evaluation(folder, name, same=6) for name in ("zero_shot_base", "tuned_by_grpo"))
    run_sheet([one, two], output=folder / "sheet.html", questions=8, seed=3)
    return folder / "sheet.html"


def test_the_sheet_shows_what_is_rated_and_not_whose_it_is(sheet: Path) -> None:
    text, data, key = sheet.read_text(encoding="utf-8"), data_of(sheet), read_key(sheet.with_suffix(".key.json"))
    assert "zero_shot_base" not in text and "tuned_by_grpo" not in text and "is_correct" not in text
    assert data["sheet"] == key.sheet and [item["id"] for item in data["items"]] == [row.item for row in key.items]
    assert set(data["items"][0]) == {"id", "question", "options", "gold", "reasoning", "answer", "images"}
    records = {
        name: {record.sample_id: record for record in read_records(Path(name) / "samples.jsonl")}
        for name in key.evaluations
    }
    for item, row in zip(data["items"], key.items):
        for name in row.evaluations:
            record = records[name][row.sample_id]
            assert (item["question"], item["answer"]) == (record.question, record.answer)
            assert item["reasoning"] == record.think and item["gold"].startswith(record.gold)
            assert (row.image_key, row.is_correct) == (record.image_key, record.is_correct)
        assert item["images"] and all(data["images"][name].startswith("data:image/") for name in item["images"])
    shown = [(row.sample_id, name) for row in key.items for name in row.evaluations]
    assert len(set(shown)) == len(shown) == 2 * len({id for id, _ in shown}) == 16
    assert {len(row.evaluations) for row in key.items} == {1, 2}, "equal answers are one item"
    alone = [row.evaluations[0] for row in key.items if len(row.evaluations) == 1]
    assert alone != sorted(alone) and alone != sorted(alone, reverse=True), "runs are mixed"


def test_nothing_on_it_can_run_or_load(sheet: Path) -> None:
    text = sheet.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and "</script><script>document.title" not in text
    policy = unescape(text.partition("<style>")[0])
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in policy and "unsafe" not in policy
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text)


def test_seed_decides_and_more_questions_add(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path, "one")
    evaluated = [Evaluated("one", folder, read_records(folder / "samples.jsonl"))]

    def ids(count: int, seed: int) -> list[str]:
        return [item.record.sample_id for item in choose_items(evaluated, count, seed)]

    assert ids(6, 0) == ids(6, 0) and ids(6, 0) != ids(6, 1)
    assert set(ids(4, 0)) < set(ids(6, 0)) and ids(12, 0) != [record.sample_id for record in evaluated[0].records]


def test_ratings_go_back_to_the_evaluations(sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = read_key(sheet.with_suffix(".key.json"))
    ratings = [
        {"item": row.item, "correct": row.is_correct, "reasoning": 3 if row.is_correct else 1, "comment": ""}
        for row in key.items
    ]
    files = []
    for rater in ("Anna", "Ben"):
        found = {"format": "medvqa-rl ratings 1", "sheet": key.sheet, "rater": rater, "ratings": ratings}
        files.append(tmp_path / f"{rater}.json")
        write(files[-1], found)
    results = run_ratings(sheet.with_suffix(".key.json"), files, output=tmp_path / "out" / "people.json")
    for row in results["evaluations"]:
        assert row["accuracy"]["estimate"] == pytest.approx(row["scorer_accuracy"])
        assert row["reasoning"]["estimate"] == pytest.approx(1 + 2 * row["scorer_accuracy"])
    assert results["agreement"]["correct"]["kappa"]["estimate"] == 1.0
    stored = json.loads((tmp_path / "out" / "people.json").read_text())
    assert (
        stored["sheet"] == key.sheet and stored["evaluations"][0]["accuracy"] == results["evaluations"][0]["accuracy"]
    )
    text = (tmp_path / "out" / "people.md").read_text()
    assert "Krippendorff" in text and "| correct | " in text and "Agreement between raters" in capsys.readouterr().out


def test_without_images_and_without_data(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path, "one")
    results = json.loads((folder / "results.json").read_text())
    write(folder / "results.json", results | {"dataset": {"name": "x", "fingerprint": "another"}})
    with pytest.raises(ValueError, match=r"cannot be found.*--no-images"):
        run_sheet([folder], output=tmp_path / "sheet.html", questions=3)
    assert not (tmp_path / "sheet.html").exists()
    run_sheet([folder], output=tmp_path / "sheet.html", questions=3, images=False)
    assert data_of(tmp_path / "sheet.html")["images"] == {}
    write(folder / "results.json", {key: value for key, value in results.items() if key != "config"})
    with pytest.raises(ValueError, match="does not name its data set"):
        samples_of_records(folder, [])
    stored = read_records(folder / "samples.jsonl")
    step = tmp_path / "run" / "eval" / "step_000010"  # while training: the settings are the run's
    write(step / "results.json", {"dataset": results["dataset"]})
    write(tmp_path / "run" / "config.resolved.json", results["config"])
    assert samples_of_records(step, stored).keys() == {one.sample_id for one in stored}
    records = [replace(one, image_key="moved") for one in stored]
    write(folder / "results.json", results)
    with pytest.raises(ValueError, match="cannot be found"):
        samples_of_records(folder, records)


def test_bad_input_is_refused_in_a_sentence(tmp_path: Path) -> None:
    one, two = write_evaluation(tmp_path, "one"), write_evaluation(tmp_path, "two", 10)
    out = tmp_path / "sheet.html"
    with pytest.raises(ValueError, match=r"let its name end in \.html"):
        run_sheet([one], output=tmp_path / "sheet.pdf", questions=3)
    with pytest.raises(ValueError, match="have different questions"):
        run_sheet([one, two], output=out, questions=3)
    with pytest.raises(ValueError, match="is given twice"):
        run_sheet([one, one], output=out, questions=3)
    with pytest.raises(ValueError, match="holds 2 evaluations"):
        run_sheet([tmp_path], output=out, questions=3)
    lost = write_evaluation(tmp_path, "lost", is_correct=None, unscored_reason="no image")
    with pytest.raises(ValueError, match="No question is scored in all"):
        run_sheet([lost], output=out, questions=3)
    run_sheet([one], output=out, questions=3)
    with pytest.raises(ValueError, match=r"file .* exists.*--replace"):
        run_sheet([one], output=out, questions=3)
    run_sheet([one], output=out, questions=2, replace=True)
    assert len(data_of(out)["items"]) == 2
