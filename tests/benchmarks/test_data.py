"""The data benchmark runs; its limits are meant for 200,000 rows on an idle machine.

Run: pytest tests/benchmarks/test_data.py
"""

import sys

import pytest

from benchmarks import data
from tests import forking


def test_the_benchmark_runs_on_a_small_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data.subprocess, "run", forking.run)
    monkeypatch.setattr(sys, "argv", ["data", "--rows", "300", "--images", "16"])
    assert data.main() == 0
    printed = capsys.readouterr().out
    for part in (
        "table of 300 rows",
        "first load",
        "second load",
        "peak",
        "no prefetching",
        "prompts/s in training",
        "in evaluation, memory grew by",
    ):
        assert part in printed
