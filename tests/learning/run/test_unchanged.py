"""Data and judges must be the same when a run is resumed; changed reward functions are recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.learning.run.unchanged import check_rewards, source_hash
from medvqa_rl.rewards.judges import JudgeIdentity

IDENTITY = JudgeIdentity("j", "w", "p", 0.0)


def test_a_run_is_resumed_with_its_judge_only(tmp_path: Path) -> None:
    check_rewards(tmp_path, {"reward": IDENTITY}, {}, resume=False)
    written = json.loads((tmp_path / "judge.json").read_text())
    assert written == {"reward": {"name": "j", "fingerprint": "w", "prompt_hash": "p", "strictness": 0.0}}
    check_rewards(tmp_path, {"reward": IDENTITY}, {}, resume=True)
    with pytest.raises(ValueError, match="judge has changed since this run was started"):
        check_rewards(tmp_path, {"reward": JudgeIdentity("j", "w2", "p", 0.0)}, {}, resume=True)


def test_a_run_without_judge_and_functions_does_not_mention_any(tmp_path: Path) -> None:
    check_rewards(tmp_path, {}, {}, resume=False)
    assert not list(tmp_path.iterdir())


def versions() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    def first(completions: Any, **kwargs: Any) -> list[float]:
        return [1.0 for _ in completions]

    same = first

    def changed(completions: Any, **kwargs: Any) -> list[float]:
        return [2.0 for _ in completions]

    return first, same, changed


def test_a_changed_source_of_a_function_is_found(tmp_path: Path) -> None:
    first, same, changed = versions()
    check_rewards(tmp_path, {}, {"m.f": first}, resume=False)
    assert json.loads((tmp_path / "rewards.json").read_text()) == {"m.f": source_hash(first)}
    assert not check_rewards(tmp_path, {}, {"m.f": same}, resume=True)
    found = check_rewards(tmp_path, {}, {"m.f": changed, "m.new": first}, resume=True)
    assert found == {"m.f": (source_hash(first), source_hash(changed))}
    assert json.loads((tmp_path / "rewards.json").read_text()) == {"m.f": source_hash(first)}, "of the first start"


def test_a_function_without_known_source_is_recorded_as_such(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec("def typed(completions, **kwargs): return [0.0]", names)
    assert source_hash(names["typed"]) is None
    check_rewards(tmp_path, {}, {"m.typed": names["typed"]}, resume=False)
    assert json.loads((tmp_path / "rewards.json").read_text()) == {"m.typed": None}
    assert not check_rewards(tmp_path, {}, {"m.typed": versions()[0]}, resume=True)


def test_the_source_of_a_callable_object_is_that_of_its_class() -> None:
    class Scorer:
        def __init__(self, weight: float) -> None:
            self.weight = weight

        def __call__(self, completions: Any, **kwargs: Any) -> list[float]:
            return [self.weight for _ in completions]

    assert source_hash(Scorer(1.0)) == source_hash(Scorer(2.0)) is not None
    first, _, changed = versions()
    assert source_hash(partial(first)) == source_hash(first) != source_hash(partial(changed))
    assert source_hash(max) is None
