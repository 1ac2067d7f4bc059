"""Choose training questions by how often a model's sampled answers to them are right, as an evaluation of the training
split recorded it. Imports no torch."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import read_json
from medvqa_rl.core.randomness import address
from medvqa_rl.core.text import shown
from medvqa_rl.core.types import Dataset, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.records import EvalRecord, read_records

_RESULTS = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class ChosenQuestions:
    """Some of a data set's questions, in an order of their own."""

    base: Dataset
    indices: Sequence[int]
    """The questions, as indices into ``base``."""
    left_out: Mapping[str, int]
    """Numbers of the other questions by reason."""

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def fingerprint(self) -> str:
        """Of the whole data set, which questions were chosen, and their order."""
        digest = hashlib.sha256(repr((self.base.fingerprint, [int(index) for index in self.indices])).encode())
        return digest.hexdigest()[:16]

    @property
    def notes(self) -> Mapping[str, int]:
        return {**self.base.notes, **self.left_out}

    @property
    def is_endless(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.base[self.indices[index]]


def load_training_set(config: DataConfig) -> Dataset:
    """Load the questions that ``data.pass_rate`` and ``data.order`` leave for training, in this order.

    Raises:
        ValueError: the data or the pass rates cannot be used, or no question is left.
    """
    dataset = load_dataset(config, "train")
    return dataset if config.pass_rate_from is None else choose_questions(dataset, config)


def choose_questions(dataset: Dataset, config: DataConfig) -> ChosenQuestions:
    """Keep the questions whose pass rate is in ``data.pass_rate``, both ends included.

    ``data.order: easy_to_hard`` sorts them by falling pass rate, and by a hash of ``data.seed`` and the id where rates
    are equal. Questions that could not be scored are left out.

    Raises:
        ValueError: see :func:`read_pass_rates`; or no question is left.
    """
    rates = read_pass_rates(dataset, config)
    low, high = config.pass_rate or (0.0, 1.0)
    chosen = [(index, rate) for index, rate in enumerate(rates) if rate is not None and low <= rate <= high]
    known = [rate for rate in rates if rate is not None]
    if not chosen:
        found = f"those of the {len(known)} questions are from {min(known):g} to {max(known):g}" if known else "none"
        raise ValueError(
            f"data.pass_rate is [{low:g}, {high:g}], but no training question of {dataset.name} has such a pass rate: "
            f"{found}; choose other bounds (`medvqa-rl data check` shows how many questions have which rate)."
        )
    if config.order == "easy_to_hard":
        chosen.sort(key=lambda item: (-item[1], address("easy to hard", config.seed, dataset[item[0]].id)))
    left_out = {
        f"left out: pass rate not from {low:g} to {high:g}": len(known) - len(chosen),
        "left out: no pass rate, because it could not be scored": len(rates) - len(known),
    }
    return ChosenQuestions(
        dataset, [index for index, _ in chosen], {why: count for why, count in left_out.items() if count}
    )


def read_pass_rates(dataset: Dataset, config: DataConfig) -> list[float | None]:
    """Read the share of sampled answers that are right, for each training question; None if unscored.

    Raises:
        ValueError: ``data.pass_rate_from`` has no evaluation with sampled answers, or one of other questions.
    """
    assert config.pass_rate_from is not None
    source = Path(config.pass_rate_from).expanduser()
    file = _find(source, dataset.name)
    records = {record.sample_id: record for record in read_records(file)}
    remedy = "evaluate them with `medvqa-rl eval CONFIG --split train --samples 8`, and give its folder"
    if not any(record.sampled for record in records.values()):
        raise ValueError(
            f"data.pass_rate_from is {shown(config.pass_rate_from)}, but {file} has no sampled answers, so no pass "
            f"rates: {remedy}."
        )
    samples = [dataset[index] for index in range(len(dataset))]
    others = [sample for sample in samples if not _is_same(records.get(sample.id), sample)]
    if others:
        raise ValueError(
            f"data.pass_rate_from is {shown(config.pass_rate_from)}, but {file} is of other questions: "
            f"{len(others):,} of the {len(samples):,} training questions of {dataset.name} are not in it, such as "
            f"{shown(others[0].id)}: {remedy}."
        )
    return [_rate(records[sample.id]) for sample in samples]


def _rate(record: EvalRecord) -> float | None:
    if not record.is_scored or not record.sampled:
        return None
    return sum(answer.is_correct for answer in record.sampled) / len(record.sampled)


def _is_same(record: EvalRecord | None, sample: Sample) -> bool:
    """Whether a record is of a sample, and not only of one with the same id."""
    return record is not None and (record.question, record.image_key) == (sample.question, sample.image_key)


def _find(source: Path, name: str) -> Path:
    """The records in a file, in the folder of an evaluation, or in the only one of a run on the training split.

    Raises:
        ValueError: there are none, or several.
    """
    if source.is_file():
        return source
    if (source / "samples.jsonl").is_file():
        return source / "samples.jsonl"
    found = [
        results.with_name("samples.jsonl")
        for results in sorted(source.glob("eval/*/results.json"))
        if _dataset(results) == name
    ]
    if len(found) == 1:
        return found[0]
    if not source.exists():
        raise ValueError(
            f"data.pass_rate_from is {shown(str(source))}, but there is no such file or folder: give the folder of an "
            "evaluation of the training questions."
        )
    what = f"{len(found)} evaluations" if found else "no evaluation"
    raise ValueError(
        f"data.pass_rate_from is {shown(str(source))}, which has {what} of {name}: "
        + (
            f"give the folder of one, such as {shlex.quote(str(found[0].parent))}."
            if found
            else "evaluate the training questions with `medvqa-rl eval CONFIG --split train --samples 8`, and give "
            "its folder."
        )
    )


def _dataset(results: Path) -> str | None:
    """The name of the data set that was evaluated."""
    dataset = read_json(_RESULTS, results, "evaluate again, or restore the file").get("dataset")
    return dataset.get("name") if isinstance(dataset, dict) else None


def histogram(rates: Sequence[float | None]) -> list[tuple[str, int]]:
    """Count questions by pass rate: each rate of up to 16 answers, else tenths.

    Returns:
        Label and number of questions, from never to always right; at the end those without a rate, if any.
    """
    known = [rate for rate in rates if rate is not None]
    values = sorted(set(known))
    if len(values) <= 17:
        counted = Counter(known)
        rows = [(f"{value:.3g}", counted[value]) for value in values]
    else:
        tenths = Counter(min(int(rate * 10), 9) for rate in known)
        rows = [(f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}", tenths[tenth]) for tenth in range(10)]
    unscored = len(rates) - len(known)
    return rows + ([("not scored", unscored)] if unscored else [])
