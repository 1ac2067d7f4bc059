"""Reading the folder of a run, whole or not: what can be read is there, what is missing is said. Imports no torch.

A run may still be going, be from another version, or be damaged. Only a folder without any file of a run is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medvqa_rl.core.text import first_few
from medvqa_rl.evaluation.records import EvalRecord, read_records

Row = Mapping[str, float]
"""The finite numbers of a line of metrics.jsonl, ``step`` among them."""

_SUMMARY = ("accuracy", "accuracy_low", "accuracy_high", "num_scored", "num_clusters", "majority_baseline")
_FILES = ("status.json", "metrics.jsonl", "config.resolved.json")


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation in a run's folder."""

    name: str
    """Name of its folder under ``eval``."""
    results: Mapping[str, Any]
    """The content of results.json."""
    samples: Path
    judged: Mapping[str, Any] = field(default_factory=dict)
    """The content of judged.json; empty where nothing was judged."""

    @property
    def step(self) -> int | None:
        """The training step after which it was made; None where it has another name."""
        number = self.name.removeprefix("step_")
        return int(number) if number != self.name and number.isdecimal() else None

    def records(self) -> list[EvalRecord]:
        """Its answers.

        Raises:
            ValueError: samples.jsonl is missing, damaged or of another version.
        """
        return read_records(self.samples)


@dataclass(frozen=True)
class StoredCompletion:
    """A sampled completion as a run stored it."""

    text: str
    is_correct: bool
    has_answer: bool
    is_truncated: bool
    num_tokens: int
    rewards: Mapping[str, float | None]
    """Parts before their weights; None is unscored."""
    reward: float | None
    advantage: float


@dataclass(frozen=True)
class StoredGroup:
    """The completions of one prompt in one step."""

    step: int
    sample_id: str
    question: str
    options: tuple[str, ...]
    gold: str
    tags: Mapping[str, str]
    """Answer type, modality, family and the like; empty in runs of versions that did not store them."""
    completions: Sequence[StoredCompletion]


@dataclass(frozen=True)
class StoredRun:
    """What a run's folder holds."""

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.resolved.json; empty where it is missing."""
    env: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    status: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Row] = ()
    """Lines of metrics.jsonl in their order."""
    evaluations: Sequence[StoredEvaluation] = ()
    """Those after training steps first, in order of steps, then the others by name."""
    problems: Sequence[str] = ()
    """Sentences about what could not be read."""

    @property
    def name(self) -> str:
        return self.path.name or self.path.resolve().name

    @property
    def steps(self) -> list[Row]:
        """The lines of training steps."""
        return [row for row in self.metrics if not is_evaluation(row)]

    @property
    def evals(self) -> list[Row]:
        """The lines of evaluations."""
        return [row for row in self.metrics if is_evaluation(row)]


def is_evaluation(row: Row) -> bool:
    """Whether a line of metrics.jsonl is of an evaluation, not of a training step."""
    return all(name.startswith("eval/") for name in row if name != "step")


def read_run(path: Path) -> StoredRun:
    """Read everything but the sampled completions.

    Raises:
        ValueError: it is no folder, or holds no file of a run.
    """
    if not path.is_dir():
        raise ValueError(
            f"There is no folder {path}: name the folder of a run, which `medvqa-rl train` calls output_dir."
        )
    if not any((path / name).is_file() for name in _FILES) and not any(path.glob("eval/*/results.json")):
        inside = sorted(child.name for child in path.iterdir() if any((child / name).is_file() for name in _FILES))
        hint = (
            f"it has runs inside ({', '.join(inside[:5])}), name one of them" if inside else f"it has no {_FILES[0]}"
        )
        raise ValueError(f"The folder {path} is not the folder of a run: {hint}.")
    problems: list[str] = []
    return StoredRun(
        path,
        config=_object(path / "config.resolved.json", problems),
        env=_object(path / "env.json", problems),
        data=_object(path / "data.json", problems),
        status=_object(path / "status.json", problems),
        metrics=_metrics(path / "metrics.jsonl", problems),
        evaluations=_evaluations(path / "eval", problems),
        problems=problems,
    )


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; empty, and a problem, where there is none."""
    if not path.is_file():
        problems.append(f"{path.name} is missing.")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({type(error).__name__}).")
        return {}
    if isinstance(value, dict):
        return value
    problems.append(f"{path.name} holds no settings or facts.")
    return {}


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with one per line, and their line numbers; bad lines are left out and said."""
    bad: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:  # JSON or UTF-8
            row = None
        if isinstance(row, dict):
            yield number, row
        elif line.strip():
            bad.append(number)
    if bad:
        problems.append(_left_out(path, bad))


def _left_out(path: Path, bad: Sequence[int]) -> str:
    lines = "line" if len(bad) == 1 else "lines"
    return f"{path.name}: {lines} {first_few(bad, 5)} cannot be read and {'is' if len(bad) == 1 else 'are'} left out."


def _metrics(path: Path, problems: list[str]) -> list[Row]:
    if not path.is_file():
        problems.append("metrics.jsonl is missing: there are no curves.")
        return []
    rows: list[Row] = []
    bad = []
    for number, line in _lines(path, problems):
        row = {name: float(value) for name, value in line.items() if _is_number(value)}
        if "step" in row and len(line) > 1:
            rows.append(row)
        else:
            bad.append(number)
    if bad:
        problems.append(_left_out(path, bad))
    if not rows:
        problems.append("metrics.jsonl holds no step.")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _evaluations(folder: Path, problems: list[str]) -> list[StoredEvaluation]:
    found = []
    for path in sorted(folder.glob("*/results.json")):
        own: list[str] = []
        results = _object(path, own)
        if own or not isinstance(results.get("by"), dict) or not results.keys() >= set(_SUMMARY):
            problems.append(f"eval/{path.parent.name}/results.json is damaged or of another version, and left out.")
        else:
            judged = path.with_name("judged.json")
            said = _object(judged, problems) if judged.is_file() else {}
            found.append(StoredEvaluation(path.parent.name, results, path.with_name("samples.jsonl"), said))
    return sorted(found, key=lambda item: (item.step is None, item.step or 0, item.name))


def read_groups(run: StoredRun) -> tuple[list[StoredGroup], list[str]]:
    """The sampled completions that a run stored, by step and prompt, and what could not be read."""
    problems: list[str] = []
    groups: list[StoredGroup] = []
    for path in sorted(run.path.glob("samples/step_*.jsonl")):
        previous: tuple[str, int] | None = None
        completions: list[StoredCompletion] = []
        bad = []
        for number, line in _lines(path, problems):
            try:
                completion, place = _completion(line), (str(line["sample_id"]), int(line["index"]))
                # A prompt can come twice in a step, where one epoch ends and the next begins.
                if previous is None or previous[0] != place[0] or place[1] <= previous[1]:
                    completions = []
                    groups.append(_group(line, completions))
            except (KeyError, TypeError, ValueError, AttributeError):
                bad.append(number)
                continue
            completions.append(completion)
            previous = place
        if bad:
            problems.append(_left_out(path, bad))
    return groups, problems


def _group(line: Mapping[str, Any], completions: list[StoredCompletion]) -> StoredGroup:
    tags = {"answer_type": line["answer_type"], **line["groups"]} if "answer_type" in line else {}
    tags |= {"prompt": line["template"]} if "template" in line else {}
    return StoredGroup(
        step=int(line["step"]),
        sample_id=str(line["sample_id"]),
        question=str(line["question"]),
        options=tuple(map(str, line["options"])),
        gold=str(line["gold"]),
        tags={str(name): str(value) for name, value in tags.items()},
        completions=completions,
    )


def _completion(line: Mapping[str, Any]) -> StoredCompletion:
    return StoredCompletion(
        text=str(line["completion"]),
        is_correct=bool(line["is_correct"]),
        has_answer=bool(line["has_answer"]),
        is_truncated=bool(line["is_truncated"]),
        num_tokens=int(line["length"]),
        rewards={str(name): _optional(value) for name, value in line["rewards"].items()},
        reward=_optional(line["reward"]),
        advantage=float(line["advantage"]),
    )


def _optional(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
