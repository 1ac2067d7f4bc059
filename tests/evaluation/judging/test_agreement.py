"""Agreement of a judge with labels, against hand computation, statsmodels and scipy.

Run: pytest tests/evaluation/judging/test_agreement.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa

from medvqa_rl.evaluation.judging.agreement import LabelledPair, by_group, margin_bins, read_pairs
from medvqa_rl.evaluation.statistics.raters import kappa_interval
from medvqa_rl.rewards.judges import Grade, JudgeRequest


def pairs_of(labels: str, group: str = "all") -> list[LabelledPair]:
    """One pair for each + (coherent) and - (not), each a cluster of its own."""
    return [
        LabelledPair(JudgeRequest("", (), str(number)), label == "+", f"{group} {number}", group)
        for number, label in enumerate(labels)
    ]


def grades_of(said: str) -> list[Grade]:
    return [Grade.failed("?") if word == "?" else Grade(float(word == "+")) for word in said]


def test_measures_by_hand() -> None:
    #                             9 scored: 5 yes, 4 no; 6 right; 2 of 4 no are said yes; 1 of 5 yes is said no
    found = by_group(pairs_of("+++++----+"), grades_of("++++-++--?"))["all"]
    assert found["n"] == 10 and found["unscored_rate"] == pytest.approx(0.1)
    assert found["label_yes_rate"] == pytest.approx(5 / 9) and found["verdict_yes_rate"] == pytest.approx(6 / 9)
    assert found["accuracy"]["estimate"] == pytest.approx(6 / 9)
    assert found["false_yes_rate"]["estimate"] == pytest.approx(2 / 4)
    assert found["false_no_rate"]["estimate"] == pytest.approx(1 / 5)
    expected = 5 / 9 * 6 / 9 + 4 / 9 * 3 / 9
    assert found["kappa"]["estimate"] == pytest.approx((6 / 9 - expected) / (1 - expected))
    for name in ("accuracy", "kappa", "false_yes_rate", "false_no_rate"):
        assert found[name]["low"] <= found[name]["estimate"] <= found[name]["high"]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_kappa_equals_statsmodels(rows: list[tuple[bool, bool]]) -> None:
    labels, said = zip(*rows)
    table = np.zeros((2, 2))
    for label, verdict in rows:
        table[int(label), int(verdict)] += 1
    kappa = kappa_interval(labels, said, range(len(labels)), resamples=0).estimate
    if len(set(labels)) == 1 or len(set(said)) == 1:
        assert math.isnan(kappa), "1 - D_o / D_e is 0 or 0 / 0, whatever the other says"
    else:
        assert kappa == pytest.approx(float(reference_kappa(table).kappa), abs=1e-12)


def test_the_interval_of_kappa_widens_with_clusters_and_holds_its_estimate() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random(400) < 0.5).tolist()
    said = [label if generator.random() < 0.85 else not label for label in labels]
    alone = kappa_interval(labels, said, list(range(400)))
    error = float(reference_kappa(_table(labels, said)).std_kappa)
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    twice = kappa_interval(labels * 2, said * 2, [*range(400), *range(400)])
    assert twice.estimate == pytest.approx(alone.estimate)
    assert twice.high - twice.low == pytest.approx(alone.high - alone.low, rel=0.05)


def _table(labels: list[bool], said: list[bool]) -> np.ndarray:
    table = np.zeros((2, 2))
    for label, verdict in zip(labels, said):
        table[int(label), int(verdict)] += 1
    return table


def test_rates_without_items_are_none() -> None:
    found = by_group(pairs_of("++"), grades_of("+-"))["all"]
    assert found["false_yes_rate"] is None and found["false_no_rate"]["estimate"] == 0.5
    nothing = by_group(pairs_of("+-"), grades_of("??"))["all"]
    assert nothing["unscored_rate"] == 1.0
    assert nothing["accuracy"] is None and nothing["kappa"] is None and math.isnan(nothing["label_yes_rate"])


def test_groups_are_reported_separately() -> None:
    pairs = [*pairs_of("++--", "a"), *pairs_of("+-", "b")]
    found = by_group(pairs, grades_of("++---+"))
    assert list(found) == ["all", "a", "b"]
    assert [found[name]["accuracy"]["estimate"] for name in found] == pytest.approx([4 / 6, 1.0, 0.0])


def test_margin_bins_count_and_bound() -> None:
    margins = [3.0, -1.0, 2.0, -2.0, 1.0, 0.0]
    labels = [True, False, True, False, True, False]
    low, high = margin_bins(margins, labels, bins=2)
    assert (low.margin, low.count, low.observed) == (-1.0, 3, 0.0)
    assert (high.margin, high.count, high.observed) == (2.0, 3, 1.0)
    bounds = binomtest(0, 3).proportion_ci(method="exact")
    assert (low.low, low.high) == pytest.approx((bounds.low, bounds.high))
    assert len(margin_bins(margins[:1], labels[:1])) == 1


def test_pairs_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"reasoning": "A mass.", "label": "Yes", "question": "Q?", "options": ["a", "b"], "group": "g", "id": 7},
        {"reasoning": "B.", "label": False},
        {"reasoning": "C.", "label": 1, "unknown": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8-sig")
    first, second, third = read_pairs(path)
    assert first == LabelledPair(JudgeRequest("Q?", ("a", "b"), "A mass."), True, "7", "g")
    assert not second.is_coherent and third.is_coherent and second.cluster != third.cluster


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2 of .* is not JSON"),
        ("[]", "Line 2 of .* has no text under reasoning"),
        ('{"label": "yes"}', "no text under reasoning"),
        ('{"reasoning": "x"}', "has the label None: write yes or no"),
        ('{"reasoning": "x", "label": "maybe"}', "has the label 'maybe'"),
        ('{"reasoning": "x", "label": 1, "options": "ab"}', "options that are not a list of texts"),
        ('{"reasoning": "x", "label": 1, "question": 3}', "a question that is not a text"),
    ],
)
def test_bad_pairs_are_reported_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"reasoning": "x", "label": "no"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_a_file_without_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no lines"):
        read_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_pairs(tmp_path / "pairs.jsonl")


@given(st.text(max_size=80))
def test_any_line_is_a_pair_or_a_clear_error(line: str) -> None:
    from medvqa_rl.evaluation.judging.agreement import _read_pair

    try:
        pair = _read_pair(line, "Line 1", "1")
    except ValueError as error:
        assert str(error).startswith("Line 1")
    else:
        assert isinstance(pair.is_coherent, bool)
