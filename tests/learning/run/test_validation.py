"""Which weights a run keeps as its best.

Run: pytest tests/learning/run/test_validation.py
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medvqa_rl.config import EvalConfig
from medvqa_rl.learning.run import validation


@pytest.mark.parametrize(
    ("accuracies", "start", "best"),
    [
        ({0: 0.9, 10: 0.5, 20: 0.5}, (None, 0), (10, 0.5)),
        ({10: 0.5, 20: 0.6}, (None, 0), (20, 0.6)),
        ({10: 0.5}, (0.9, 0), (10, 0.5)),
    ],
)
def test_the_best_checkpoint_is_the_earliest_of_equals_and_never_step_0(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accuracies: dict[int, float],
    start: tuple[float | None, int],
    best: tuple[int, float],
) -> None:
    """The last case resumes a run of an older version, whose best step was 0."""
    saved: list[int] = []
    monkeypatch.setattr(validation, "save_best", lambda folder, policy, state: saved.append(state.step))
    monkeypatch.setattr(validation, "write_evaluation", lambda *_: None)
    state: Any = SimpleNamespace(step=0, best_accuracy=start[0], best_step=start[1], is_evaluated=False)
    run: Any = SimpleNamespace(
        evaluation=lambda step: tmp_path / str(step), best=tmp_path / "best", check_folder=lambda: None
    )
    nothing: Any = SimpleNamespace(record=lambda *_: None, show=lambda *_: None, say=lambda *_: None)
    for state.step, accuracy in accuracies.items():
        found: Any = SimpleNamespace(results={"unscored_rate": 0.0}, metrics={"eval/accuracy": accuracy})
        validation.log_and_keep_best(found, run, nothing, nothing, state, EvalConfig())
    assert (state.best_step, state.best_accuracy) == best
    assert saved[-1] == best[0] and 0 not in saved
