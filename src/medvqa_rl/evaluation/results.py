"""The schema of ``results.json``: the fields that comparisons, reports, cards and studies read. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from medvqa_rl.core.files import parse_json

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


class _Results(_Summary):
    by: dict[str, dict[str, _Summary]]
    dataset: dict[str, Any] = {}
    model: dict[str, Any] | None = None
    settings: dict[str, Any] = {}
    config: dict[str, Any] = {}


RESULTS = TypeAdapter(_Results)


def check_results(text: bytes, where: str, remedy: str) -> dict[str, Any]:
    """Return the content of a results.json, fields that the schema does not name included.

    Raises:
        ValueError: a field is missing or has another type; see :func:`medvqa_rl.core.files.parse_json`.
    """
    parse_json(RESULTS, text, where, remedy)
    found: dict[str, Any] = json.loads(text)
    return found


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json.

    Raises:
        ValueError: the file is damaged; the message names the field.
        OSError: it cannot be read.
    """
    return check_results(path.read_bytes(), f"The file {path}", "evaluate again, or restore the file")
