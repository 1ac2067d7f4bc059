"""The schema of ``results.json``: the fields that comparisons, reports, cards and studies read. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from medvqa_rl.core.files import parse_json
from medvqa_rl.rewards.judges import JudgeIdentity

Share = float | None
"""None where it is not defined."""


class _Summary(BaseModel):
    accuracy: Share
    accuracy_low: Share
    accuracy_high: Share
    num_scored: int
    num_clusters: int
    majority_baseline: Share
    n: int = 0
    effective_n: Share = None
    no_answer_rate: Share = None
    format_rate: Share = None
    truncated_rate: Share = None
    unscored_rate: Share = None
    mean_length: Share = None
    median_length: Share = None


class _Spread(BaseModel):
    mean: Share
    variance: Share


class _Lengths(BaseModel):
    all: _Spread
    right: _Spread
    wrong: _Spread


class _Measure(BaseModel):
    value: Share = None
    reward: Share = None
    by: str | None = None


class _Origin(BaseModel):
    """What was evaluated."""

    dataset: dict[str, Any] = {}
    model: dict[str, Any] | None = None
    settings: dict[str, Any] = {}
    config: dict[str, Any] = {}
    judges: dict[str, JudgeIdentity] = {}


class _Results(_Summary, _Origin):
    by: dict[str, dict[str, _Summary]]
    thinking: _Measure = _Measure()
    perplexity: _Measure = _Measure()
    similarity: _Measure = _Measure()
    faithfulness: _Measure = _Measure()
    lengths: dict[Literal["total", "think"], _Lengths] = {}


class _Measured(_Results):
    """As the current version writes them."""

    accuracy: float
    lengths: dict[Literal["total", "think"], _Lengths] = Field(min_length=2)
    thinking: _Measure
    perplexity: _Measure


_ORIGIN, _RESULTS, _MEASURED = TypeAdapter(_Origin), TypeAdapter(_Results), TypeAdapter(_Measured)
_REMEDY = "evaluate again, or restore the file"


def check_results(text: bytes, where: str, remedy: str) -> dict[str, Any]:
    """Return the content of a results.json, fields that the schema does not name included.

    Raises:
        ValueError: a field is missing or has another type; see :func:`medvqa_rl.core.files.parse_json`.
    """
    return _check(_RESULTS, text, where, remedy)


def _check(schema: TypeAdapter[Any], text: bytes, where: str, remedy: str) -> dict[str, Any]:
    parse_json(schema, text, where, remedy)
    found: dict[str, Any] = json.loads(text)
    return found


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json with all that the current version writes.

    Raises:
        ValueError: the file is damaged; the message names the field.
        OSError: it cannot be read.
    """
    return _check(_MEASURED, path.read_bytes(), f"The file {path}", _REMEDY)


def read_origin(folder: Path) -> dict[str, Any]:
    """Read what the evaluation in a folder is of, from its results.json: ``dataset``, ``model``, ``settings``,
    ``config`` and ``judges``, each checked if it is there. Empty without the file.

    Raises:
        ValueError: the file is damaged; the message names the field.
        OSError: it cannot be read.
    """
    path = folder / "results.json"
    return _check(_ORIGIN, path.read_bytes(), f"The file {path}", _REMEDY) if path.is_file() else {}
