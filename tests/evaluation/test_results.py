"""Reading results.json: every field that is used is checked.

Run: pytest tests/evaluation/test_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.evaluation.judging.instrument import read_identities
from medvqa_rl.evaluation.results import read_origin, read_results

JUDGE = {"name": "phantom:judge", "fingerprint": "f", "prompt_hash": "p", "strictness": 0}
SPREAD = {name: {"n": 2, "mean": 3.0, "variance": None} for name in ("all", "right", "wrong")}
SUMMARY = {
    **{"accuracy": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.9, "majority_baseline": None},
    **{"num_scored": 2, "num_clusters": 2},
}
RESULTS: dict[str, Any] = {
    **SUMMARY,
    "by": {"organ": {"lung": SUMMARY}},
    "dataset": {"name": "phantom"},
    "model": {"path": "phantom:base", "weights": "w"},
    "judges": {"reward": JUDGE, "evaluation": JUDGE},
    "lengths": {"total": SPREAD, "think": SPREAD},
    "thinking": {"format": 1.0, "reward": None, "by": None},
    "perplexity": {"value": 3.5, "by": "phantom:lm"},
    "something": "of a later version",
}


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_sound_results_are_returned_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "results.json", RESULTS)
    assert read_results(path) == RESULTS
    assert read_origin(tmp_path) == RESULTS
    (identity,) = read_identities(RESULTS).items()  # not the judge of the evaluation itself
    assert identity[0] == "reward" and identity[1].to_json() == JUDGE
    assert read_origin(tmp_path / "nowhere") == {} and read_identities({}) == {}


DAMAGES: list[tuple[dict[str, Any], str]] = [
    ({"judges": {"reward": JUDGE | {"strictness": "0"}}}, "has '0' under judges.reward.strictness"),
    ({"judges": {"reward": 7}}, "has 7 under judges.reward"),
    ({"judges": []}, "has [] under judges"),
    ({"model": []}, "has [] under model"),
    ({"config": "x"}, "has 'x' under config"),
]


@pytest.mark.parametrize(("change", "expected"), DAMAGES)
def test_a_damaged_origin_is_named(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "results.json", RESULTS | change)
    for read in (lambda: read_origin(tmp_path), lambda: read_results(path)):
        with pytest.raises(ValueError) as error:
            read()
        message = str(error.value)
        assert message.startswith(f"The file {path} {expected}") and message.endswith(
            ": evaluate again, or restore the file."
        )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"accuracy": True}, "under accuracy"),
        ({"accuracy": None}, "under accuracy"),
        ({"lengths": {"total": SPREAD}}, "under lengths"),
        ({"lengths": {"total": SPREAD, "think": {**SPREAD, "right": 3}}}, "under lengths.think.right"),
        ({"perplexity": {"value": "low"}}, "has 'low' under perplexity.value"),
        ({"by": {"organ": {"lung": {**SUMMARY, "num_scored": 1.5}}}}, "has 1.5 under by.organ.lung.num_scored"),
    ],
)
def test_a_damaged_number_is_named(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "results.json", RESULTS | change)
    with pytest.raises(ValueError, match="evaluate again, or restore the file") as error:
        read_results(path)
    assert expected in str(error.value)
    read_origin(tmp_path)  # says nothing about numbers
