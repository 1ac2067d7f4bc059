"""Whether a judge is worth using, and what its runs know of it.

Run: pytest tests/evaluation/judging/test_calibration.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.cli.judge import calibrate
from medvqa_rl.config import JudgeConfig
from medvqa_rl.data.phantom.claims import claims, is_coherent, is_true
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.evaluation.judging.agreement import agreement
from medvqa_rl.evaluation.judging.calibration import calibration_warnings, recall, remember, worth
from medvqa_rl.rewards.judges import Grade, JudgeIdentity, JudgeRequest

IDENTITY = JudgeIdentity("j", "w", "p", 0.0)


class Saying:
    """Says the words in turn."""

    def __init__(self, words: str, identity: JudgeIdentity = IDENTITY) -> None:
        self.identity, self.words = identity, words

    @property
    def counters(self) -> Mapping[str, float]:
        return {}

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        known = {"y": Grade(1.0), "n": Grade(0.0), "?": Grade.failed("no word")}
        return [known[word] for word in self.words[: len(requests)]]


def compared(labels: str, words: str) -> dict[str, Any]:
    scores = [{"y": 1.0, "n": 0.0, "?": math.nan}[word] for word in words]
    return agreement([label == "y" for label in labels], scores, [str(i) for i in range(len(labels))])


def test_a_judge_that_agrees_is_worth_using() -> None:
    """Of 40 pairs 36 are equal and half is Yes on both sides: kappa is (0.9 - 0.5) / 0.5."""
    found = worth(compared("yn" * 20, "yn" * 18 + "ny" * 2), "pairs")
    assert found.is_worth_using is True
    assert found.summary.startswith("Worth using: its kappa of 0.80 [0.")
    assert found.summary.endswith(
        "] is above 0, which is chance; it says Yes to 50 % of 40 texts of pairs, of which 50 % are labelled Yes."
    )


@pytest.mark.parametrize(
    ("labels", "words", "summary"),
    [
        ("yyyn" * 10, "n" * 40, "it says No to all 40 texts of pairs, of which 75 % are labelled Yes."),
        ("yn" * 20, "y" * 40, "it says Yes to all 40 texts of pairs, of which 50 % are labelled Yes."),
        ("yn" * 20, "?" * 40, "it gave no verdict on any of 40 texts of pairs."),
        ("yn" * 20, "y" * 39 + "?", "it says Yes to all 39 texts of pairs, of which 51 % are labelled Yes."),
        ("yynn" * 10, "yn" * 20, "its kappa of 0.00 [-0."),
        ("yn" * 20, "yn" * 11 + "ny" * 9, "its kappa of 0.10 [-0."),
        ("yn" * 20, "ny" * 20, "its kappa of -1.00 [-1.00, -0."),
    ],
    ids=[
        "always No",
        "always Yes",
        "unread",
        "always Yes where read",
        "chance",
        "perhaps chance",
        "the other way round",
    ],
)
def test_a_judge_that_is_no_better_than_chance_is_not(labels: str, words: str, summary: str) -> None:
    found = worth(compared(labels, words), "pairs")
    assert found.is_worth_using is False and found.summary.startswith(f"Not worth using: {summary}")


def test_equal_labels_cannot_tell() -> None:
    found = worth(compared("y" * 20, "yn" * 10), "pairs")
    assert found.is_worth_using is None and "all 20 texts of pairs have the same label" in found.summary


def test_only_the_same_judge_is_warned_about(tmp_path: Path) -> None:
    judge = Saying("n")
    assert recall(tmp_path, IDENTITY) is None and calibration_warnings(tmp_path, [judge]) == []
    bad = worth(compared("yn" * 20, "n" * 40), "pairs")
    remember(tmp_path, IDENTITY, bad)
    assert recall(tmp_path, IDENTITY) == bad
    (line,) = calibration_warnings(tmp_path, [judge])
    assert line.startswith("Warning: by its calibration the judge j, which rewards, should not. Not worth using: it")
    for change in ({"fingerprint": "other"}, {"prompt_hash": "other"}, {"strictness": 1.0}):
        other = Saying("n", replace(IDENTITY, **change))  # type: ignore[arg-type]
        assert calibration_warnings(tmp_path, [other]) == []
    remember(tmp_path, IDENTITY, worth(compared("yn" * 20, "yn" * 20), "pairs"))
    assert calibration_warnings(tmp_path, [judge]) == [], "the last one counts"
    (tmp_path / IDENTITY.key / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match=r"calibration\.json.*remove it, and calibrate the judge again"):
        calibration_warnings(tmp_path, [judge])


def test_calibrate_says_it_in_one_line_and_remembers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels of your own decide; without them those of the phantom world."""
    config = JudgeConfig(cache_dir=str(tmp_path / "cache"))
    judges, pairs = tmp_path / "cache" / "judges", tmp_path / "pairs.jsonl"
    rows = '{"reasoning": "So.", "label": "yes"}\n{"reasoning": "So.", "label": "no"}\n'
    pairs.write_text(rows * 10)
    monkeypatch.setattr(calibrate, "load_judge", lambda config: Saying("yn" * 10))
    results = calibrate.run_calibrate(config, pairs_file=pairs, count=20, with_policies=False)
    assert results["is_worth_using"] is True and "20 texts of pairs" in results["summary"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "orth using" in line]
    assert line == results["summary"] and recall(judges, IDENTITY) == worth(
        results["sources"]["pairs"]["groups"]["all"], "pairs"
    )
    monkeypatch.setattr(calibrate, "load_judge", lambda config: Saying("n" * 20))
    results = calibrate.run_calibrate(config, count=20, with_policies=False)
    assert results["summary"].startswith("Not worth using: it says No to all 20 texts of phantom, of which")
    found = recall(judges, IDENTITY)
    assert found is not None and found.is_worth_using is False


def test_a_judge_that_sees_is_measured_against_the_truth_of_claims(tmp_path: Path) -> None:
    pairs = calibrate.phantom_pairs(60, 0, sees="image", with_policies=False)
    labels, scanners = [], set()
    for pair in pairs:
        source = pair.request.images[0].source
        assert isinstance(source, PhantomImage)
        scanners.add(source.scanner)
        told = claims(pair.request.reasoning)
        labels.append(bool(told) and all(is_true(claim, source.scene) for claim in told))
        assert pair.request.description.startswith(f"The modality is {source.scene.modality}.")
    assert [pair.is_coherent for pair in pairs] == labels and 10 < sum(labels) < 50
    assert scanners == {"home", "unseen", "worn"}
    coherent = [pair.is_coherent for pair in calibrate.phantom_pairs(60, 0, with_policies=False)]
    assert coherent == [is_coherent(pair.request.reasoning) for pair in pairs] != labels
    (tmp_path / "pairs.jsonl").write_text('{"reasoning": "So.", "label": "yes"}\n')
    with pytest.raises(ValueError, match=r"--sees is image, but the texts of --pairs come without images"):
        calibrate.run_calibrate(JudgeConfig(sees="image"), pairs_file=tmp_path / "pairs.jsonl")
