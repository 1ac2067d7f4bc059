"""Instruments that measure the outputs of a finished evaluation: perplexity, similarity, a judge.

Imports no torch until a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.progress import waiting
from medvqa_rl.evaluation.measures.similarity import Similarity, candidate_text, load_similarity
from medvqa_rl.evaluation.records import EvalRecord

if TYPE_CHECKING:
    from medvqa_rl.evaluation.measures.fluency import LanguageModel


@dataclass(frozen=True)
class NamedJudge:
    """A judge of reasoning."""

    name: str
    """As reported in results."""
    verdicts: Callable[[Sequence[EvalRecord]], Sequence[float]]
    """Returns one value per record: 1 for coherent reasoning, else 0; NaN if the judge failed."""


@dataclass(frozen=True)
class Instruments:
    """The available instruments; None is not measured."""

    language_model: LanguageModel | None = None
    similarity: Similarity | None = None
    judge: NamedJudge | None = None


NOTHING = Instruments()


def load_instruments(config: EvalConfig, device: str, judge: NamedJudge | None = None) -> Instruments:
    """Load the configured instruments.

    Args:
        config: ``perplexity_model`` and ``similarity``.
        device: of the models.
        judge: provides the judged part of the thinking reward.

    Raises:
        ValueError: a model cannot be loaded.
    """
    language_model = None
    if config.perplexity_model is not None:
        from medvqa_rl.evaluation.measures.fluency import load_language_model

        with waiting(f"loading {config.perplexity_model}"):
            language_model = load_language_model(config.perplexity_model, device)
    similarity = None if config.similarity is None else load_similarity(config.similarity, device)
    return Instruments(language_model, similarity, judge)


def remaining(records: Sequence[EvalRecord], instruments: Instruments) -> Instruments:
    """Return the instruments that have not measured every record yet; a judge always, because it caches."""
    scored = [record for record in records if record.is_scored]
    model, similarity = instruments.language_model, instruments.similarity
    if model is not None and all(record.perplexity_by == model.name for record in scored):
        model = None
    if similarity is not None and all(record.similarity_by == similarity.name for record in scored):
        similarity = None
    return Instruments(model, similarity, instruments.judge)


def measure(records: Sequence[EvalRecord], instruments: Instruments) -> list[EvalRecord]:
    """Measure the outputs of the scored records; unscored ones are returned unchanged."""
    indices = [index for index, record in enumerate(records) if record.is_scored]
    some = [records[index] for index in indices]
    if model := instruments.language_model:
        likelihoods = model.score([record.text for record in some])
        some = [
            replace(record, nll=found.nll, nll_tokens=found.num_tokens, perplexity_by=model.name)
            for record, found in zip(some, likelihoods)
        ]
    if similarity := instruments.similarity:
        pairs = [(candidate_text(record), gold) for record in some for gold in record.references]
        found = iter(similarity.compare([text for text, _ in pairs], [gold for _, gold in pairs]))
        cosines = [max(islice(found, len(record.references))) for record in some]
        some = [
            replace(record, similarity=cosine, similarity_by=similarity.name) for record, cosine in zip(some, cosines)
        ]
    if judge := instruments.judge:
        verdicts = judge.verdicts(some)
        assert len(verdicts) == len(some), "one verdict per record"
        some = [
            replace(record, verdict=None if math.isnan(verdict) else float(verdict), verdict_by=judge.name)
            for record, verdict in zip(some, verdicts)
        ]
    measured = list(records)
    for index, record in zip(indices, some):
        measured[index] = record
    return measured
