"""A small recipe, and finished cells with given outcomes that need no training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from medvqa_rl.config import EvalConfig
from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.core.files import without_nan
from medvqa_rl.evaluation.records import EvalRecord, record_line
from medvqa_rl.evaluation.statistics.summary import summarise
from medvqa_rl.study.plan.recipe import Cell, Recipe
from tests.records import make_record


def tiny(model: str) -> dict[str, Any]:
    """Three arms with a random model."""
    return {
        "baseline": "grpo",
        "seeds": [0, 1],
        "settings": {
            "model": {"path": model, "device": "cpu"},
            "data": {"name": "phantom", "answer_types": ["choice"]},
            "rollout": {"num_generations": 2, "max_completion_length": 16},
            "train": {"steps": 4, "prompts_per_step": 2, "save_steps": 1},
            "sft": {"batch_size": 2},
            "eval": {"bootstrap": 20, "max_samples": 4},
        },
        "arms": {
            "zero_shot": {"verb": "none"},
            "sft": {"verb": "sft", "published": 52.0},
            "grpo": {"verb": "train", "settings": {"rewards": {"ecr": 0.5}}, "published": 58.04},
        },
        "tests": {"home": {"data": {"num_test": 6}}},
        "quick": {"seeds": [0], "settings": {"train": {"steps": 2}}},
        "forecast": {"seconds_per_step": {"train": 60, "sft": 30}, "seconds_per_question": 15, "seconds_per_start": 0},
    }


def write(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(write_yaml(recipe), encoding="utf-8")
    return path


def records_of(flags: str) -> list[EvalRecord]:
    """Records that are correct (1), wrong (0) or unscored (-), with two questions per image."""
    return [
        make_record(
            sample_id=str(number),
            image_key=str(number // 2),
            is_correct=None if flag == "-" else flag == "1",
            is_well_formed=False,
            has_answer=False,
            similarity=0.5,
        )
        for number, flag in enumerate(flags)
    ]


def store(
    recipe: Recipe,
    outcomes: dict[tuple[str, int], str],
    *,
    change: Callable[[Cell, EvalRecord], EvalRecord] = lambda cell, record: record,
    rows: Callable[[Cell], list[dict[str, Any]]] = lambda cell: [{"step": 1, "step_time": 2.0}],
) -> None:
    """Write finished cells with the records of :func:`records_of`, the same for every test.

    Args:
        recipe: the cells to write.
        outcomes: (arm, seed) -> a character for each question; other cells stay unfinished.
        change: edits a record of a cell.
        rows: returns metrics.jsonl of a cell.
    """
    for cell in recipe.cells:
        flags = outcomes.get((cell.arm.name, cell.seed))
        if flags is None:
            continue
        by = "tfidf" if cell.arm.name == "grpo" else "other"
        records = [change(cell, replace(record, similarity_by=by)) for record in records_of(flags)]
        for test in cell.tests:
            test.folder.mkdir(parents=True)
            (test.folder / "samples.jsonl").write_text("".join(map(record_line, records)))
            results = without_nan(summarise(records, EvalConfig(bootstrap=20)))
            (test.folder / "results.json").write_text(json.dumps(results))
        if cell.arm.verb != "none":
            (cell.folder / "status.json").write_text(json.dumps({"state": "finished", "step": 4}))
            (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(cell)))


OUTCOMES = {
    ("zero_shot", 0): "0010000010-",
    ("sft", 0): "00111001110",
    ("sft", 1): "01100001111",
    ("grpo", 0): "11111101110",
    ("grpo", 1): "11110111111",
}
