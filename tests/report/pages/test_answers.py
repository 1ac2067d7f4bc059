"""The browser of evaluations' answers: what is chosen and shown, alike by Python and by the page's script.

Run: pytest tests/report/pages/test_answers.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page
from synthetic import EVIL, make_run, write, write_eval, write_evaluation

from medvqa_rl.config import DataConfig, EvalConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.records import EvalRecord, SampledAnswer, write_records
from medvqa_rl.evaluation.statistics.summary import summarise
from medvqa_rl.report.pages import answers
from medvqa_rl.report.pages.answers import Query, build_answers, groups_of, merge_answers, question_json, select
from medvqa_rl.report.pages.report import write_report
from medvqa_rl.report.runs import read_run
from tests.records import make_record

CHOICE = ("left lung", "right lung")


def records(*outcomes: str) -> list[EvalRecord]:
    """A record per letter: r right, w wrong, n no answer, u unscored."""
    made = []
    for index, letter in enumerate(outcomes):
        answer = {"r": "A", "w": "B"}.get(letter)
        made.append(
            make_record(
                sample_id=f"q{index}",
                question=f"Where is finding {index}?",
                options=CHOICE,
                gold="A",
                output="" if letter == "u" else f"<think>Seen {letter}.</think><answer>{answer}</answer>",
                answer=answer,
                choice=answer,
                is_correct=None if letter == "u" else letter == "r",
                has_answer=answer is not None,
                groups={"modality": "CT" if index % 2 else "MRI"},
                unscored_reason="The image is damaged." if letter == "u" else None,
            )
        )
    return made


BOTH = {"before": records(*"rrwwnu"), "after": records(*"rwrwru")}


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (Query("after"), "012345"),
        (Query("nowhere"), ""),
        (Query("after", outcome="right"), "024"),
        (Query("before", outcome="none"), "4"),
        (Query("after", outcome="unscored"), "5"),
        (Query("after", against="before", flip="gained"), "24"),
        (Query("after", against="before", flip="lost"), "1"),
        (Query("after", against="before", flip="changed"), "124"),
        (Query("before", against="after", flip="gained"), "1"),
        (Query("after", flip="changed"), ""),
        (Query("after", against="nowhere"), ""),
        (Query("after", group="modality: CT"), "135"),
        (Query("after", group="answer_type: choice"), "012345"),
        (Query("after", answer="b"), "13"),
        (Query("after", answer=" b: RIGHT"), "13"),
        (Query("after", words="finding 3"), "3"),
        (Query("after", words="seen n."), ""),
        (Query("after", against="before", words="SEEN n."), "4"),
        (Query("after", outcome="wrong", group="modality: MRI"), ""),
    ],
)
def test_what_a_query_finds(query: Query, found: str) -> None:
    chosen = select(merge_answers(BOTH), query)
    assert [question_json(one)["id"] for one in chosen] == [f"q{number}" for number in found]


def test_a_question_is_merged_only_with_itself() -> None:
    one, other = records("r"), records("w")
    changed = make_record(sample_id="q0", question="Another?", options=CHOICE, gold="A")
    assert [set(question) for question in merge_answers({"a": one, "b": other})] == [{"a", "b"}]
    assert [set(question) for question in merge_answers({"a": one, "b": [changed]})] == [{"a"}, {"b"}]


def test_what_is_shown_of_an_answer() -> None:
    sampled = tuple(
        SampledAnswer("x", vote, vote, is_correct=vote == "lung", num_tokens=1, is_truncated=False)
        for vote in ("lung", "lung", "heart", None)
    )
    one = make_record(
        gold="lung", alternatives=("lungs",), output="The lung is.", answer="the lung", is_correct=True,
        answer_type="open",
        answer_probability=0.75, token_f1=2 / 3, rouge_l=0.5, faithfulness=0.25, verdict=1.0, nll=4.0, nll_tokens=2,
        why="It is the gold answer.", sampled=sampled, is_truncated=True, num_tokens=7,
    )  # fmt: skip
    shown = question_json({"x": one})
    assert shown["gold"] == "lung (also correct: lungs)" and shown["tags"]["answer_type"] == "open"
    answer = shown["answers"]["x"]
    assert answer["parts"] == [
        ["format", 1.0], ["correctness", 1.0], ["probability", 0.75], ["F1", 0.6667], ["ROUGE-L", 0.5],
        ["coherent", 1.0], ["faithful", 0.25],
        ["perplexity", 7.3891],
    ]  # fmt: skip
    assert answer["sampled"] == "2 of 4 sampled answers correct; votes: lung 2, heart 1, no answer 1"
    assert (answer["vote"], answer["why"], answer["cut"], answer["tokens"]) == (
        "the lung",
        "It is the gold answer.",
        True,
        7,
    )
    failed = question_json({"x": records("u")[0]})["answers"]["x"]
    assert failed["parts"] == [] and failed["why"] == "The image is damaged." and failed["outcome"] == "unscored"


def add_evaluation(folder: Path, found: list[EvalRecord], **results: Any) -> None:
    write(folder / "results.json", {**summarise(found, EvalConfig(bootstrap=20)), **results})
    write_records(found, folder / "samples.jsonl")


def test_large_evaluations_are_subsampled_alike_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_QUESTIONS", 10)
    run = tmp_path / "run"
    for name in ("before", "after"):
        add_evaluation(run / "eval" / f"{name}_big", records(*"rw" * 500))
    add_evaluation(
        tmp_path / "run" / "eval" / "small", [make_record(sample_id=f"s{n}", dataset="s") for n in range(3)]
    )
    evaluations, viewer = build_answers([read_run(run)], images=False)
    assert [name.partition(" ")[0] for name in evaluations] == ["before_big", "after_big", "small"]
    assert [one["id"] for one in viewer.groups] == ["q199", "q399", "q599", "q799", "q999", "s0", "s1", "s2"]
    assert [len(one["answers"]) for one in viewer.groups] == [2] * 5 + [1] * 3
    assert viewer.notes[0] == "8 of 1003 questions are shown, evenly subsampled, to keep the page small."
    monkeypatch.setattr(answers, "MAX_TEXT_BYTES", 1)
    assert len(build_answers([read_run(run)], images=False)[1].groups) == 1


def test_damaged_answers_are_named_and_the_others_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "eval" / "step_000000" / "samples.jsonl").write_text("{}\n")
    evaluations, viewer = build_answers([read_run(run)])
    assert list(evaluations) == ["step 40 (phantom/home/val)"] and len(viewer.groups) == 20
    assert viewer.notes[0].startswith("The answers of step 0 (phantom/home/val) cannot be shown: Line 1 of ")
    assert "The images of step 40 (phantom/home/val) are not shown: " in viewer.notes[1]


def test_images_are_those_of_the_questions(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_evaluation(run / "eval", "home", 6)
    data = load_dataset(DataConfig(num_test=6), "test")
    _, viewer = build_answers([read_run(run)])
    shown = {one["id"]: one["images"] for one in viewer.groups}
    for index in range(6):
        (key,) = shown[data[index].id]
        image = np.asarray(decoded(viewer.images[key]), float)
        assert np.abs(image - np.asarray(data[index].images[0].load(), float)).mean() < 8


def decoded(uri: str) -> Any:
    import base64
    import io

    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_groups_come_from_the_results() -> None:
    class Stored:
        results = {"by": {"modality": {"MRI": {}, "CT": {}}, "answer_type": {"choice": {}}}}

    assert groups_of([Stored()]) == {"modality": ["CT", "MRI"]}  # type: ignore[list-item]


# --- in the browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the two evaluations above, and one of phantom questions with hostile texts."""
    run = tmp_path_factory.mktemp("answers") / "run"
    for name, found in BOTH.items():
        add_evaluation(run / "eval" / f"{name}_x", found)
    write_evaluation(run / "eval", "hostile", 12)
    return write_report([run], run.parent / "report.html")


@pytest.fixture
def page(tab: Page, report: Path) -> Iterator[Page]:
    tab.look(width=1200, theme="light")
    tab.open(report)
    tab.messages.clear()
    yield tab
    assert tab.messages == []


NAMES = {"before": "before_x (validation)", "after": "after_x (validation)"}
SHOWN = "[...document.querySelectorAll('#a-entries .entry')]"


@pytest.mark.browser
def test_the_script_finds_what_python_finds(page: Page, report: Path) -> None:
    """Every fifth combination of some values of each filter; Chromium allows 200 changes of the address in a row."""
    text = report.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(text)["evaluations"] == [*NAMES.values(), "hostile (phantom/home/test)"]
    count = 0
    values = [("before", "after"), ("", "before"), ("", "wrong", "unscored"), ("", "changed", "lost")]
    values += [("", "modality: CT"), ("", " b"), ("", "finding seen r")]
    for evaluation, against, outcome, flip, group, answer, words in [*product(*values)][::5]:
        query = Query(evaluation, against, outcome, flip, group, answer, words)
        state = {
            "a-eval": NAMES[evaluation], "a-against": NAMES.get(against, ""), "a-outcome": outcome, "a-flip": flip,
            "a-group": group, "a-answer": answer, "a-q": words,
        }  # fmt: skip
        page.run(
            "new Promise(done => { addEventListener('hashchange', () => setTimeout(done), {once: true}); "
            f"location.hash = new URLSearchParams({json.dumps(state)}); }})"
        )
        ids = page.run(f"{SHOWN}.map(e => e.querySelector('.tags').textContent.match(/id: (.*)/)[1])")
        assert ids == [question_json(one)["id"] for one in select(merge_answers(BOTH), query)], asdict(query)
        count += len(ids)
    assert count > 30


@pytest.mark.browser
def test_flips_are_shown_side_by_side(page: Page) -> None:
    page.choose("a-eval", NAMES["after"])
    assert page.run("document.getElementById('a-flip').disabled")
    page.choose("a-against", NAMES["before"])
    page.choose("a-flip", "gained")
    assert page.run("document.getElementById('a-where').textContent") == "Page 1 of 1 · 2 of 6 questions"
    assert page.run(f"{SHOWN}.map(e => e.querySelector('p').textContent)") == [
        "wrong → correct",
        "no answer → correct",
    ]
    heads = page.run(f"[...{SHOWN}[0].querySelectorAll('.completion header')].map(e => e.textContent)")
    assert heads == [
        f"wrong{NAMES['before']}answer B: right lung3 tokensformat 1, correctness 0",
        f"correct{NAMES['after']}answer A: left lung3 tokensformat 1, correctness 1",
    ]
    assert page.run(f"{SHOWN}[0].querySelector('.gold').textContent") == "A: left lung"
    assert page.run("location.hash").startswith("#a-eval=after_x") and "a-flip=gained" in page.run("location.hash")


@pytest.mark.browser
def test_an_answer_with_a_script_shows_as_text(page: Page) -> None:
    assert page.run(f"{SHOWN}.length") == 10 and page.run("document.title") == "Report: run"
    shown = EVIL.encode("utf-8", "replace").decode()
    assert shown[:-1] in page.run(f"{SHOWN}[0].querySelector('.text').textContent")
    assert page.run("document.querySelectorAll('#answers script, #answers [onerror]').length") == 0
    assert page.run(f"{SHOWN}.every(e => e.querySelector('img').naturalWidth > 0)")


@pytest.mark.browser
def test_keys_are_for_the_browser_that_is_seen(tab: Page, tmp_path: Path) -> None:
    tab.open(write_report([make_run(tmp_path / "run")], tmp_path / "report.html"))
    tab.press("/")
    assert tab.run("document.activeElement.id") == "a-q"
    tab.press("Escape")
    tab.press("n")
    assert tab.run("location.hash") == "#a-page=2"
    tab.run("document.getElementById('samples').scrollIntoView()")
    tab.press("/")
    assert tab.run("document.activeElement.id") == "q"


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 1400])
def test_figures_stay_legible(tab: Page, tmp_path: Path, width: int) -> None:
    """No text of a figure is drawn smaller than 10 pixels."""
    write_eval((run := make_run(tmp_path / "run")) / "eval" / "step_000020", [True] * 20)
    tab.look(width=width, theme="dark")
    tab.open(write_report([run], tmp_path / "report.html"))
    assert tab.run("document.documentElement.scrollWidth") == width
    heights = tab.run(
        "[...document.querySelectorAll('svg text')].map(e => "
        "parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"
    )
    assert len(heights) > 50 and min(heights) >= 10
    assert re.search("Answers in evaluations", tab.run("document.body.textContent"))
