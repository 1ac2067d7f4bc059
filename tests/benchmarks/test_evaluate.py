"""The benchmark of evaluations: its interval, and that it runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import evaluate


def test_the_interval_by_hand() -> None:
    found = evaluate.interval(
        [1.0, 1.0, 2.0], [2.0, 4.0, 4.0]
    )  # ratios 2, 4, 2: logs of mean 4/3 and deviation 1/sqrt(3)
    assert found["ratio"] == pytest.approx(2 ** (4 / 3))
    half = 4.302652729911275 * math.log(2) / math.sqrt(3) / math.sqrt(3)  # t of 0.975 with 2 degrees of freedom
    assert found["low"] == pytest.approx(2 ** (4 / 3) * math.exp(-half))
    assert found["high"] == pytest.approx(2 ** (4 / 3) * math.exp(half))
    assert math.isnan(evaluate.interval([1.0], [2.0])["low"])


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert evaluate.main(["--preset", "smoke", "--rounds", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert capsys.readouterr().out.splitlines()[-1] == f"speedup: {found['ratio']['generate']['ratio']:.2f}"
    assert found["same"] == {"ours": 1.0, "generate": 1.0}
    assert found["questions"] == 4
