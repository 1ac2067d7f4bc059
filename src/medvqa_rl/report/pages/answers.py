"""The answers of evaluations for a page's browser: each question once, with the answer of every evaluation that asked
it. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvqa_rl.core.types import LETTERS, Sample
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.summary import grouping
from medvqa_rl.report.comparisons import accuracy_rows
from medvqa_rl.report.pages.images import Thumbnails, samples_of_records
from medvqa_rl.report.pages.viewer import Viewer, evenly, within
from medvqa_rl.report.runs import StoredEvaluation, StoredRun

PAGE = 10
"""Questions shown at once."""
MAX_QUESTIONS = 400
MAX_TEXT_BYTES = 1_500_000
MAX_IMAGE_BYTES = 1_500_000

Question = Mapping[str, EvalRecord]
"""The records of one question by the name of the evaluation."""


@dataclass(frozen=True)
class Query:
    """Which questions a browser shows. The page's script chooses alike among those inside the page."""

    evaluation: str
    """Name of the evaluation whose answers are shown."""
    against: str = ""
    """Name of another one, shown beside it; only questions of both are found."""
    outcome: str = ""
    """right, wrong, none (no answer) or unscored."""
    flip: str = ""
    """gained: wrong in ``against`` and right now; lost: the reverse; changed: either."""
    group: str = ""
    """``key: value``, such as ``modality: CT``."""
    answer: str = ""
    """The beginning of the answer, such as the letter of an option."""
    words: str = ""
    """Words that the question or the shown answers hold, in any order."""


def shown_evaluations(runs: Sequence[StoredRun], *, every: bool = False) -> dict[str, StoredEvaluation]:
    """Return the evaluations of a page's table by the name that the browser shows.

    Args:
        every: all evaluations during training, not only the first and the last.
    """
    found: dict[str, StoredEvaluation] = {}
    for run, label, evaluation in accuracy_rows(runs, every=every):
        name = label if len(runs) == 1 else f"{run}: {label}"
        found[name if name not in found else f"{name}, {evaluation.name}"] = evaluation
    return found


def counterpart(runs: Sequence[StoredRun], names: Sequence[str]) -> str:
    """Return the evaluation of the first run that the last one of ``names`` is best compared with; may be empty."""
    if len(runs) < 2 or not names:
        return ""
    wanted = f"{runs[0].name}: {names[-1].removeprefix(f'{runs[-1].name}: ')}"
    return wanted if wanted in names and wanted != names[-1] else ""


def groups_of(evaluations: Iterable[StoredEvaluation]) -> dict[str, list[str]]:
    """The groups that a browser can filter by, from the results alone: values by key."""
    found: dict[str, set[str]] = {}
    for evaluation in evaluations:
        for key, values in evaluation.results["by"].items():
            found.setdefault(key, set()).update(values)
    return {key: sorted(values) for key, values in found.items() if len(values) > 1}


def merge_answers(answers: Mapping[str, Sequence[EvalRecord]]) -> list[Question]:
    """Merge the records of evaluations by question, in the order of the first evaluation that asked it."""
    found: dict[tuple[object, ...], dict[str, EvalRecord]] = {}
    for name, records in answers.items():
        for one in records:
            asked = (one.dataset, one.sample_id, one.question, one.options, one.gold, one.alternatives)
            found.setdefault(asked, {})[name] = one
    return list(found.values())


def select(questions: Iterable[Question], query: Query) -> list[Question]:
    """Return the questions that a query asks for."""
    return [question for question in questions if _matches(question, query)]


def _matches(question: Question, query: Query) -> bool:
    record, other = question.get(query.evaluation), question.get(query.against)
    if record is None or (query.against and other is None):
        return False
    if query.outcome and outcome(record) != query.outcome:
        return False
    if query.flip and (other is None or query.flip not in _flips(other, record)):
        return False
    if query.group and query.group not in [f"{key}: {value}" for key, value in grouping(record).items()]:
        return False
    if query.answer and not vote_of(record).lower().startswith(query.answer.strip().lower()):
        return False
    if not query.words.strip():
        return True
    shown = [record.sample_id, record.question, record.reference, *record.options, record.output]
    text = "\n".join([*shown, *([] if other is None else [other.output])]).lower()
    return all(word in text for word in query.words.lower().split())


def _flips(before: EvalRecord, after: EvalRecord) -> tuple[str, ...]:
    if not (before.is_scored and after.is_scored) or before.is_correct == after.is_correct:
        return ()
    return "changed", "gained" if after.is_correct else "lost"


def outcome(record: EvalRecord) -> str:
    """right, wrong, none (no answer) or unscored."""
    if not record.is_scored:
        return "unscored"
    return "right" if record.is_correct else "wrong" if record.has_answer else "none"


def vote_of(record: EvalRecord) -> str:
    """What was answered: the option as ``B: text`` if it names one, else the answer; empty for none."""
    options = dict(zip(LETTERS, record.options))
    if record.choice in options:
        return f"{record.choice}: {options[record.choice]}"
    return record.answer or ""


def question_json(question: Question) -> dict[str, Any]:
    """Return a question as JSON for the script, without its images."""
    record = next(iter(question.values()))
    return {
        "id": record.sample_id,
        "question": record.question,
        "options": [f"{letter}: {text}" for letter, text in zip(LETTERS, record.options)],
        "gold": record.reference,
        "tags": grouping(record),
        "images": [],
        "answers": {name: _answer_json(one) for name, one in question.items()},
    }


def _answer_json(record: EvalRecord) -> dict[str, Any]:
    return {
        "text": record.output,
        "outcome": outcome(record),
        "vote": vote_of(record),
        "cut": record.is_truncated,
        "tokens": record.num_tokens,
        "parts": [[name, round(value, 4)] for name, value in _parts(record).items()],
        "why": record.unscored_reason or record.why,
        "sampled": _sampled(record),
    }


def _parts(record: EvalRecord) -> dict[str, float]:
    """What was measured of an answer. What was not, or does not apply, is left out."""
    if not record.is_scored:
        return {}
    parts = {
        "format": float(record.is_well_formed),
        "correctness": float(bool(record.is_correct)),
        "probability": record.answer_probability,
        "F1": record.token_f1,
        "ROUGE-L": record.rouge_l,
        "coherent": record.verdict,
        "faithful": record.faithfulness,
        "similarity": record.similarity,
    }
    if record.nll is not None and record.nll_tokens:
        parts["perplexity"] = math.exp(min(record.nll / record.nll_tokens, 700.0))
    return {name: value for name, value in parts.items() if value is not None and math.isfinite(value)}


def _sampled(record: EvalRecord) -> str:
    """The sampled answers in a line: how many are correct, and the most frequent votes."""
    if not record.sampled:
        return ""
    right = sum(answer.is_correct for answer in record.sampled)
    votes = Counter("no answer" if answer.vote is None else answer.vote for answer in record.sampled)
    listed = ", ".join(f"{vote} {count}" for vote, count in votes.most_common(5))
    more = f" and {len(votes) - 5} more" if len(votes) > 5 else ""
    return f"{right} of {len(record.sampled)} sampled answers correct; votes: {listed}{more}"


def build_answers(runs: Sequence[StoredRun], *, images: bool = True) -> tuple[dict[str, StoredEvaluation], Viewer]:
    """Collect the answers of the evaluations in a page's table, the same questions for each, evenly subsampled per
    data set if there are too many.

    Args:
        images: also look up the images.

    Returns:
        The evaluations by name, without those that cannot be read; and the questions.
    """
    notes: list[str] = []
    evaluations, answers = {}, {}
    for name, evaluation in shown_evaluations(runs).items():
        try:
            answers[name] = evaluation.records()
        except (ValueError, OSError) as error:
            notes.append(f"The answers of {name} cannot be shown: {error}")
        else:
            evaluations[name] = evaluation
    sets: dict[str, list[Question]] = {}
    for question in merge_answers(answers):
        sets.setdefault(next(iter(question.values())).dataset, []).append(question)
    found = [one for questions in sets.values() for one in evenly(questions, MAX_QUESTIONS // len(sets) or 1)]
    kept, plain = within(found, question_json, MAX_QUESTIONS, MAX_TEXT_BYTES)
    if len(kept) < (total := sum(map(len, sets.values()))):
        notes.append(f"{len(kept)} of {total} questions are shown, evenly subsampled, to keep the page small.")
    thumbnails = Thumbnails("a", MAX_IMAGE_BYTES)
    if images:
        notes += add_images(kept, plain, evaluations, thumbnails.add)
    elif plain:
        notes.append("The page was written without images.")
    return evaluations, Viewer(plain, thumbnails.uris, [*notes, *thumbnails.note()])


def add_images(
    questions: Sequence[Question],
    plain: Sequence[dict[str, Any]],
    evaluations: Mapping[str, StoredEvaluation],
    add: Callable[[Sample, str, list[str]], list[str]],
) -> list[str]:
    """Put the images of questions into their JSON.

    Args:
        plain: the questions' JSON.
        add: returns the keys of a sample's images on the page, given its data set and the notes.

    Returns:
        A sentence for each problem.
    """
    notes: list[str] = []
    waiting = list(zip(questions, plain))
    for name, evaluation in evaluations.items():
        own = [item for item in waiting if name in item[0]]
        if not own:
            continue
        try:
            samples = samples_of_records(
                evaluation.samples.parent, [question[name] for question, _ in own], remedy="do without its images"
            )
        except (ValueError, OSError) as error:
            notes.append(f"The images of {name} are not shown: {error}")
            continue
        for question, shown in own:
            sample = samples[question[name].sample_id]
            shown["images"] = add(sample, str(evaluation.results.get("dataset")), notes)
        waiting = [item for item in waiting if name not in item[0]]
    return notes
