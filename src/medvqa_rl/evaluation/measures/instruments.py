"""What measures the texts of an evaluation after the answers are in: fluency, similarity, a judge. Imports no torch
until a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.answers import without_tags
from medvqa_rl.evaluation.measures.similarity import Similarity, candidate_text, load_similarity
from medvqa_rl.evaluation.records import EvalRecord

if TYPE_CHECKING:
    from medvqa_rl.evaluation.measures.fluency import LanguageModel


@dataclass(frozen=True)
class NamedJudge:
    """A judge of reasoning."""

    name: str
    """What results call it."""
    verdicts: Callable[[Sequence[EvalRecord]], Sequence[float]]
    """1 for coherent reasoning, 0 for other, NaN where the judge failed; one per record."""


@dataclass(frozen=True)
class Instruments:
    """What is there to measure with; None is not measured."""

    language_model: LanguageModel | None = None
    similarity: Similarity | None = None
    judge: NamedJudge | None = None


NOTHING = Instruments()


def load_instruments(config: EvalConfig, device: str, judge: NamedJudge | None = None) -> Instruments:
    """What the settings ask for.

    Args:
        config: ``perplexity_model`` and ``similarity``.
        device: where models are put.
        judge: gives the judged part of the thinking reward.

    Raises:
        ValueError: a model cannot be loaded.
    """
    language_model = None
    if config.perplexity_model is not None:
        from medvqa_rl.evaluation.measures.fluency import load_language_model

        language_model = load_language_model(config.perplexity_model, device)
    similarity = None if config.similarity is None else load_similarity(config.similarity, device)
    return Instruments(language_model, similarity, judge)


def remaining(records: Sequence[EvalRecord], instruments: Instruments) -> Instruments:
    """Those of the instruments that have not measured every record already; a judge is always asked, for it caches."""
    scored = [record for record in records if record.is_scored]
    model, similarity = instruments.language_model, instruments.similarity
    if model is not None and all(record.perplexity_by == model.name for record in scored):
        model = None
    if similarity is not None and all(record.similarity_by == similarity.name for record in scored):
        similarity = None
    return Instruments(model, similarity, instruments.judge)


def measure(records: Sequence[EvalRecord], instruments: Instruments) -> list[EvalRecord]:
    """The records with what the instruments say of their outputs; unscored ones stay as they are."""
    places = [place for place, record in enumerate(records) if record.is_scored]
    some = [records[place] for place in places]
    if model := instruments.language_model:
        likelihoods = model.score([without_tags(record.output) for record in some])
        some = [
            replace(record, nll=found.nll, nll_tokens=found.num_tokens, perplexity_by=model.name)
            for record, found in zip(some, likelihoods)
        ]
    if similarity := instruments.similarity:
        cosines = similarity.compare(list(map(candidate_text, some)), [record.gold_text for record in some])
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
    for place, record in zip(places, some):
        measured[place] = record
    return measured
