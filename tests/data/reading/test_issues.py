"""Issues of dropped and repaired rows.

Run: pytest tests/data/reading/test_issues.py
"""

import pytest

from medvqa_rl.data.reading.issues import RowIssue, count_issues, refuse_if_too_many_dropped, rows_by_reason

ISSUES = [
    RowIssue(4, "a.csv", "stray quotes", "repaired", "'x"),
    RowIssue(7, "a.csv", "missing image", "dropped", "7.jpg", 12),
    RowIssue(1, "b.json", "missing image", "dropped", "1.jpg"),
    RowIssue(9, "a.csv", "missing image", "dropped", "", 14),
]


def test_issues_are_counted_and_grouped() -> None:
    assert list(count_issues(ISSUES).items()) == [("dropped: missing image", 3), ("repaired: stray quotes", 1)]
    assert rows_by_reason(ISSUES, "dropped") == {
        ("a.csv", "missing image"): [12, 14],
        ("b.json", "missing image"): [2],
    }


def test_too_many_dropped_rows_are_refused() -> None:
    refuse_if_too_many_dropped(ISSUES, total=30, max_dropped=0.1, name="X", folder="/x")
    with pytest.raises(
        ValueError, match=r"3 of 29 rows of X at /x .*rows 12, 14 of a\.csv.*rows 2 of b\.json.* = 0\.1 "
    ) as error:
        refuse_if_too_many_dropped(ISSUES, total=29, max_dropped=0.1, name="X", folder="/x")
    assert str(error.value).endswith("set data.max_dropped=0.11.")
    refuse_if_too_many_dropped(ISSUES, total=29, max_dropped=0.11, name="X", folder="/x")
