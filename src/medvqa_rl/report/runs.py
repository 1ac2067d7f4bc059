"""Read a run folder, complete or not. Imports no torch.

A run may be in progress, damaged or from another version: whatever can be read is returned, with a sentence for each
problem. Only a folder without any file of a run is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medvqa_rl.core.files import parse_json, step_of
from medvqa_rl.core.text import first_few, is_unicode, shown
from medvqa_rl.evaluation.records import EvalRecord, read_records
from medvqa_rl.evaluation.results import check_results
from medvqa_rl.report.schemas import COMPLETION, SCHEMAS
from medvqa_rl.rewards.attack.results import FILE as ATTACK

Row = Mapping[str, float]
"""The finite numbers in a line of metrics.jsonl, including ``step``."""

_FILES = ("status.json", "metrics.jsonl", "config.resolved.json")


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation in a run folder."""

    name: str
    """Name of its folder under ``eval``."""
    results: Mapping[str, Any]
    """The content of results.json."""
    samples: Path
    judged: Mapping[str, Any] = field(default_factory=dict)
    """The content of judged.json; empty if nothing was judged."""

    @property
    def step(self) -> int | None:
        """The training step of the evaluation; None if it was not made during training."""
        number = self.name.removeprefix("step_")
        return int(number) if number != self.name and number.isdecimal() else None

    def records(self) -> list[EvalRecord]:
        """Read its answers.

        Raises:
            ValueError: samples.jsonl is missing, damaged or has another version.
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
    """Unweighted reward parts; None if unscored."""
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
    """Answer type, modality, family and so on; empty if an older version did not store them."""
    completions: Sequence[StoredCompletion]


@dataclass(frozen=True)
class StoredRun:
    """The content of a run folder."""

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.resolved.json, the settings of the first start; empty if missing."""
    resumes: Sequence[Mapping[str, Any]] = ()
    """Lines of resumes.jsonl: what changed with each resume."""
    env: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    status: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Row] = ()
    """Lines of metrics.jsonl in order."""
    evaluations: Sequence[StoredEvaluation] = ()
    """Evaluations during training in order of steps, then the others by name."""
    attack: Mapping[str, Any] = field(default_factory=dict)
    """reward_attack.json; empty if the rewards were not attacked."""
    problems: Sequence[str] = ()
    """Sentences about what could not be read."""
    label: str = ""
    """A name that is not the folder's."""

    @property
    def name(self) -> str:
        return self.label or self.path.name or self.path.resolve().name

    @property
    def steps(self) -> list[Row]:
        """The lines of training steps."""
        return [row for row in self.metrics if not is_evaluation(row)]

    @property
    def evals(self) -> list[Row]:
        """The lines of evaluations."""
        return [row for row in self.metrics if is_evaluation(row)]


def is_evaluation(row: Row) -> bool:
    """Return whether a line of metrics.jsonl is an evaluation rather than a training step."""
    return all(name.startswith("eval/") for name in row if name != "step")


def is_run(path: Path) -> bool:
    """Whether a folder has a file that only runs have."""
    return any((path / name).is_file() for name in _FILES)


def holds_run(path: Path) -> bool:
    """Whether a folder can be read as a run: it has a file of one, or evaluations."""
    return is_run(path) or any(path.glob("eval/*/results.json"))


def read_run(path: Path, evals: Sequence[Path] = (), *, label: str = "") -> StoredRun:
    """Read a run, except for its sampled completions.

    Args:
        evals: folders with further evaluations, outside the run.
        label: a name other than the folder's.

    Raises:
        ValueError: the path is not a folder or has no file of a run, or a folder of ``evals`` has no evaluation.
    """
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}: give a run folder, the output_dir of `medvqa-rl train`.")
    if not holds_run(path):
        inside = sorted(child.name for child in path.iterdir() if is_run(child))
        hint = f"it contains runs ({', '.join(inside[:5])}), give one of them" if inside else f"it has no {_FILES[0]}"
        raise ValueError(f"The folder {path} is not a run folder: {hint}.")
    problems: list[str] = []
    return StoredRun(
        path,
        config=_object(path / "config.resolved.json", problems),
        resumes=_resumes(path / "resumes.jsonl", problems),
        env=_object(path / "env.json", problems),
        data=_object(path / "data.json", problems),
        status=_object(path / "status.json", problems),
        metrics=_metrics(path / "metrics.jsonl", problems),
        evaluations=[*_evaluations(path / "eval", problems), *_outside(evals, problems)],
        attack=_object(path / ATTACK, problems) if (path / ATTACK).is_file() else {},
        problems=problems,
        label=label,
    )


def read_headline(path: Path, *, label: str = "") -> StoredRun:
    """Read the status of a run and its main evaluations only: the first and last of training, and the others. The
    folder of an evaluation is read as a run that has nothing else."""
    problems: list[str] = []
    found = sorted(path.glob("eval/*/results.json"))
    steps = sorted((step, result) for result in found if (step := step_of(result.parent)) is not None)
    kept = [result for result in found if result not in {between for _, between in steps[1:-1]}]
    status = _object(path / "status.json", problems) if (path / "status.json").is_file() else {}
    evaluations = _stored(kept if holds_run(path) else [path / "results.json"], problems)
    return StoredRun(path, status=status, evaluations=evaluations, problems=problems, label=label)


def _object(path: Path, problems: list[str], name: str = "") -> dict[str, Any]:
    """Read a JSON object; if that fails, or a field has another type, note the problem and return an empty one.

    Args:
        name: of the file in the problem; its last part by default.
    """
    name = name or path.name
    if not path.is_file():
        problems.append(f"{name} is missing.")
        return {}
    try:
        content = path.read_bytes()
        parse_json(SCHEMAS[path.name], content, name, "it is left out")
    except OSError as error:
        problems.append(f"{name} cannot be read ({error.strerror}).")
    except ValueError as error:
        problems.append(str(error))
    else:
        found: dict[str, Any] = json.loads(content)
        return found
    return {}


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and objects of a JSON Lines file; note bad lines as a problem."""
    bad: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # JSON or UTF-8
            row = None
        if isinstance(row, dict):
            yield number, row
        elif line.strip():
            bad.append(number)
    if bad:
        problems.append(_left_out(path, bad))


def _left_out(path: Path, bad: Sequence[int]) -> str:
    lines = "line" if len(bad) == 1 else "lines"
    return f"{path.name}: {lines} {first_few(bad, 5)} cannot be read and {'is' if len(bad) == 1 else 'are'} skipped."


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
        problems.append("metrics.jsonl has no step.")
    return rows


def _resumes(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = list(_lines(path, problems))
    bad = [number for number, row in rows if not isinstance(row.get("settings"), dict) or "step" not in row]
    if bad:
        problems.append(_left_out(path, bad))
    return [row for number, row in rows if number not in bad]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _evaluations(folder: Path, problems: list[str]) -> list[StoredEvaluation]:
    """The evaluations in the folders of a folder."""
    return _stored(sorted(folder.glob("*/results.json")), problems)


def _stored(paths: Sequence[Path], problems: list[str]) -> list[StoredEvaluation]:
    found = []
    for path in paths:
        if not is_unicode(str(path)):
            problems.append(f"The name of the evaluation {shown(path.parent.name)} is not UTF-8: it is skipped.")
            continue
        name = f"{path.parent.parent.name}/{path.parent.name}/results.json is damaged or has another version: it"
        try:
            results = check_results(path.read_bytes(), name, "it is skipped")
        except (OSError, ValueError) as error:
            problems.append(str(error))
        else:
            judged = path.with_name("judged.json")
            home = f"{path.parent.parent.name}/{path.parent.name}"
            said = _object(judged, problems, f"{home}/judged.json") if judged.is_file() else {}
            found.append(StoredEvaluation(path.parent.name, results, path.with_name("samples.jsonl"), said))
    return sorted(found, key=lambda item: (item.step is None, item.step or 0, item.name))


def _outside(folders: Sequence[Path], problems: list[str]) -> list[StoredEvaluation]:
    """The evaluations in folders or directly below them, named by their paths."""
    found = []
    for folder in folders:
        inside = sorted(path for path in (folder / "results.json", *folder.glob("*/results.json")) if path.is_file())
        own = _stored(inside, problems)
        if not own:
            raise ValueError(f"There is no evaluation in {folder}: give a folder that `medvqa-rl eval` wrote.")
        found += own
    return found


def read_groups(run: StoredRun) -> tuple[list[StoredGroup], list[str]]:
    """Return the stored groups of sampled completions, by step and prompt, and the problems in reading them."""
    problems: list[str] = []
    groups: list[StoredGroup] = []
    for path in sorted(run.path.glob("samples/step_*.jsonl")):
        previous: tuple[str, int] | None = None
        completions: list[StoredCompletion] = []
        bad = []
        for number, line in _lines(path, problems):
            try:
                COMPLETION.validate_python(line, strict=True)
                completion, position = _completion(line), (str(line["sample_id"]), int(line["index"]))
                # A prompt can occur twice in a step, at the boundary of two epochs.
                if previous is None or previous[0] != position[0] or position[1] <= previous[1]:
                    completions = []
                    groups.append(_group(line, completions))
            except (KeyError, TypeError, ValueError, AttributeError):
                bad.append(number)
                continue
            completions.append(completion)
            previous = position
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
