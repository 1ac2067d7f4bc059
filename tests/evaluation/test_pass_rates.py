"""Training questions chosen by pass rate: which, in what order, and the refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.config import ConfigError, DataConfig
from medvqa_rl.config.yaml import build_config
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.pass_rates import choose_questions, histogram, load_training_set, read_pass_rates
from medvqa_rl.evaluation.records import EvalRecord, SampledAnswer, write_records

COUNT = 8
RIGHT = (4, 0, 2, 2, 1, 3, None, 4)
"""Right answers of four for each question; None is unscored."""


def config(tmp_path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"num_train": COUNT, "pass_rate_from": str(tmp_path)} | changes)


def record(sample: Any, right: int | None, samples: int = 4) -> EvalRecord:
    answers = tuple(
        SampledAnswer("A", "A", "A", is_correct=number < (right or 0), num_tokens=1, is_truncated=False)
        for number in range(samples)
    )
    return EvalRecord(
        sample_id=sample.id, image_key=sample.image_key, question=sample.question, options=sample.options,
        gold=sample.answer, output="", think=None, answer=None, is_correct=None if right is None else right > 0,
        is_well_formed=True, has_answer=True, is_truncated=False, num_tokens=1, token_f1=None,
        answer_type=sample.answer_type, sampled=() if right is None else answers,
    )  # fmt: skip


def write(folder: Path, data: DataConfig, *, samples: int = 4, changes: Mapping[str, Any] | None = None) -> list[str]:
    """Write the evaluation of the training questions, and return their ids."""
    questions = load_dataset(data, "train")
    folder.mkdir(parents=True, exist_ok=True)
    records = [record(questions[index], right, samples) for index, right in enumerate(RIGHT)]
    write_records(records, folder / "samples.jsonl")
    (folder / "results.json").write_text(json.dumps({"dataset": {"name": questions.name}}))
    return [item.sample_id for item in records]


def ids(dataset: Any) -> list[str]:
    return [dataset[index].id for index in range(len(dataset))]


def test_questions_within_the_bounds_are_kept_in_their_order(tmp_path: Path) -> None:
    data = config(tmp_path, pass_rate=(0.25, 0.75))
    names = write(tmp_path, data)
    found = load_training_set(data)
    assert ids(found) == [names[index] for index in (2, 3, 4, 5)] and not found.is_endless
    assert dict(found.notes) == {
        "left out: pass rate not from 0.25 to 0.75": 3,
        "left out: no pass rate, because it could not be scored": 1,
    }
    assert ids(load_training_set(DataConfig(num_train=COUNT))) == names


def test_easy_to_hard_falls_and_breaks_ties_by_seed(tmp_path: Path) -> None:
    data = config(tmp_path, order="easy_to_hard")
    names = write(tmp_path, data)
    order = [names.index(name) for name in ids(load_training_set(data))]
    assert [RIGHT[index] for index in order] == [4, 4, 3, 2, 2, 1, 0]
    questions = load_dataset(data, "train")
    ties = {
        tuple(choose_questions(questions, config(tmp_path, order="easy_to_hard", seed=s)).indices) for s in range(20)
    }
    assert len(ties) == 4


def test_the_fingerprint_tells_which_questions_in_which_order(tmp_path: Path) -> None:
    settings: Sequence[dict[str, Any]] = (
        {"pass_rate": (0.0, 1.0)},
        {"pass_rate": (0.25, 0.75)},
        {"pass_rate": (0.25, 1.0)},
        {"pass_rate": (0.25, 1.0), "order": "easy_to_hard"},
    )
    write(tmp_path, config(tmp_path))
    prints = [load_training_set(config(tmp_path, **changes)).fingerprint for changes in settings]
    assert len({*prints, load_dataset(config(tmp_path), "train").fingerprint}) == 5
    assert load_training_set(config(tmp_path, pass_rate=(0.2, 0.8))).fingerprint == prints[1]  # the same questions


def test_a_file_a_folder_and_a_run_are_found(tmp_path: Path) -> None:
    data = config(tmp_path)
    write(tmp_path / "run" / "eval" / "one", data)
    (tmp_path / "run" / "eval" / "other").mkdir()
    (tmp_path / "run" / "eval" / "other" / "results.json").write_text('{"dataset": {"name": "phantom/home/test"}}')
    questions = load_dataset(data, "train")
    for place in ("run", "run/eval/one", "run/eval/one/samples.jsonl"):
        rates = read_pass_rates(questions, config(tmp_path / place))
        assert rates == [1.0, 0.0, 0.5, 0.5, 0.25, 0.75, None, 1.0]
    write(tmp_path / "run" / "eval" / "two", data)
    with pytest.raises(ValueError, match=r"which has 2 evaluations of phantom/home/train: give the folder of one"):
        read_pass_rates(questions, config(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"which has no evaluation of phantom/home/train: evaluate the training"):
        read_pass_rates(questions, config(tmp_path))
    with pytest.raises(ValueError, match=r"there is no such file or folder"):
        read_pass_rates(questions, config(tmp_path / "missing"))


def test_other_questions_are_refused(tmp_path: Path) -> None:
    write(tmp_path, config(tmp_path))
    more = config(tmp_path, num_train=COUNT + 1)
    with pytest.raises(
        ValueError, match=r"is of other questions: 1 of the 9 training questions .* 'phantom-train-0-8'"
    ):
        read_pass_rates(load_dataset(more, "train"), more)
    fewer = config(tmp_path, num_train=3)
    assert read_pass_rates(load_dataset(fewer, "train"), fewer) == [1.0, 0.0, 0.5]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    changed = json.loads(lines[1]) | {"question": "Is this another question?"}  # with the id of one of ours
    (tmp_path / "samples.jsonl").write_text("\n".join([lines[0], json.dumps(changed), *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"is of other questions: 1 of the 8 training questions"):
        load_training_set(config(tmp_path))


def test_an_evaluation_without_sampled_answers_is_refused(tmp_path: Path) -> None:
    write(tmp_path, config(tmp_path), samples=0)
    with pytest.raises(ValueError, match=r"has no sampled answers, so no pass rates: evaluate them .*--samples 8"):
        load_training_set(config(tmp_path, pass_rate=(0.0, 1.0)))


def test_bounds_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    write(tmp_path, config(tmp_path))
    with pytest.raises(ValueError, match=r"\[0\.1, 0\.2\], but no training question .* those of the 7 .* from 0 to 1"):
        load_training_set(config(tmp_path, pass_rate=(0.1, 0.2)))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            {"pass_rate": [0.9, 0.1]},
            "data.pass_rate is [0.9, 0.1], but the lower bound comes first: write [0.1",
        ),
        (
            {"pass_rate": [0.1, 0.9], "pass_rate_from": None},
            "data.pass_rate is [0.1, 0.9], but data.pass_rate_from",
        ),
        ({"order": "easy_to_hard", "pass_rate_from": None}, "data.order is easy_to_hard, but data.pass_rate_from is"),
        ({}, "data.pass_rate_from is e, but nothing uses the pass rates: set data.pass_rate"),
        ({"pass_rate": [0.1, 0.9], "num_train": None}, "data.pass_rate_from is e, but data.name is phantom, whose"),
    ],
)
def test_contradictions_are_one_sentence_before_training(data: dict[str, Any], sentence: str) -> None:
    settings = {"data": {"num_train": COUNT, "pass_rate_from": "e"} | data}
    with pytest.raises(ConfigError) as caught:
        build_config(settings, purpose="train")
    (problem,) = caught.value.problems
    assert problem.startswith(sentence)
    if sentence.startswith("data.pass_rate_from is e, but nothing"):  # data check shows the histogram
        build_config(settings, purpose="eval")


def test_histogram_by_hand() -> None:
    assert histogram([0.5, None, 1.0, 0.5, 0.0]) == [("0", 1), ("0.5", 2), ("1", 1), ("not scored", 1)]
    tenths = histogram([index / 32 for index in range(33)])
    assert tenths[0] == ("0.0 to 0.1", 4) and tenths[-1] == ("0.9 to 1.0", 4)  # 0 to 3 and 29 to 32 of 32


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1))
def test_every_question_is_counted_once(rates: list[float | None]) -> None:
    assert sum(count for _, count in histogram(rates)) == len(rates)
