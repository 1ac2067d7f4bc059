"""Collapses are reported once, at the step that completes them, by the run and by the report alike.

Run: pytest tests/learning/run/test_collapse.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import toy_config

from medvqa_rl.learning.run.collapse import ENTROPY_LEFT, HIGH_KL, MISMATCH, WINDOW, find_collapses
from medvqa_rl.learning.run.logger import RunLogger
from medvqa_rl.learning.run.run_dir import RunDir
from medvqa_rl.report.health import check_health

Row = dict[str, float]


def rows(change: Callable[[int], Row], steps: int = 100) -> list[Row]:
    sound = {"reward": 1.2, "kl": 0.05, "entropy": 0.8}
    return [{"step": step, **sound, **change(step)} for step in range(1, steps + 1)]


CASES: list[tuple[str, Callable[[int], Row], dict[str, int]]] = [
    ("sound", lambda step: {}, {}),
    # 20 steps of 0 from step 41 on: their mean falls to 0.05 of 1.2 when one step of 1.2 is left, at step 59.
    ("reward to 0", lambda step: {"reward": 0.0 if step > 40 else 1.2}, {"reward": 59}),
    ("reward to 0 for 18 steps", lambda step: {"reward": 0.0 if 40 < step < 59 else 1.2}, {}),
    ("reward to a tenth", lambda step: {"reward": 0.12 if step > 40 else 1.2}, {}),
    ("never a reward", lambda step: {"reward": 0.0}, {"reward": WINDOW}),
    ("rewards that are penalties", lambda step: {"reward": -0.5}, {}),
    ("penalties outweigh rewards", lambda step: {"reward": -0.5 if step > 40 else 1.2}, {"reward": 54}),
    ("KL rises", lambda step: {"kl": step / 40}, {"kl": 50}),  # median of steps 31 to 50: 40.5 / 40
    ("KL has outliers", lambda step: {"kl": 1e6 if step % 3 == 0 else 0.1}, {}),
    # Mean of steps t-19 to t is 1 - 0.01 * (t - 9.5), that of the first 20 is 0.895: below a fifth from 92 on.
    ("entropy falls", lambda step: {"entropy": 1 - 0.01 * step}, {"entropy": 92}),
    ("a mismatch with vLLM", lambda step: {MISMATCH: 2e-5 * step**2}, {"mismatch": 8}),  # above 0.001, 5 x 2e-5
    ("a mismatch in bfloat16", lambda step: {MISMATCH: 0.01 * (1 + step % 5)}, {}),
    (
        "unscored steps are left out",
        lambda step: {"reward": math.nan} if step % 2 else {"reward": 0.0},
        {"reward": 40},
    ),
]


def finite(row: Row) -> Row:
    return {name: value for name, value in row.items() if math.isfinite(value)}


@pytest.mark.parametrize(("change", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_collapse_is_found_at_the_step_that_completes_it(change: Callable[[int], Row], expected: Row) -> None:
    found = find_collapses(map(finite, rows(change)))
    assert {sign: collapse.step for sign, collapse in found.items()} == expected
    names = {"reward": "Reward falls to 0", "kl": "High KL", "entropy": "Entropy collapses"}
    verdicts = {check.name: check.verdict for check in check_health(list(map(finite, rows(change))))}
    assert {name: verdicts[name] for name in names.values()} == {
        name: "look" if sign in expected else "fine" for sign, name in names.items()
    }


def test_a_run_reports_each_collapse_once_even_if_it_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (HIGH_KL, ENTROPY_LEFT) == (1.0, 0.2)  # as docs/report.md says
    logged = rows(lambda step: {"kl": step / 40, "loss": 0.1}, steps=80)
    config = toy_config(tmp_path, tmp_path, train={"steps": 80})
    for first, last in ((0, 60), (60, 80)):  # interrupted after 60 steps
        with RunLogger(RunDir(tmp_path), config, first_step=first) as logger:
            for row in logged[first:last]:
                logger.log(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        shown = capsys.readouterr().err
        warning = "Warning: step 50: The KL divergence from the reference is 1.01 nats per token"
        assert shown.count(warning) == (first == 0)
        assert ("lower optimizer.learning_rate" in shown) == (first == 0)
    assert (tmp_path / "train.log").read_text().count("Warning:") == 1
