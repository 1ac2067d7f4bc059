"""Fixtures for tests of data sets."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medvqa_rl.core.answers import is_correct, parse_completion
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.types import Sample, Template
from medvqa_rl.data.stored import StoredDataset

TEMPLATES: tuple[Template, ...] = ("think_answer", "direct")


@pytest.fixture
def write_images() -> Callable[..., None]:
    """Write small grey PNGs: ``write_images(folder, "a.jpg", "b/c.jpg")``."""

    def write(folder: Path, *names: str) -> None:
        for index, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 10 + index).save(path, "PNG")

    return write


@pytest.fixture
def write_csv() -> Callable[..., Path]:
    """Write a CSV file with a header: ``write_csv(path, rows)``."""

    def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


@pytest.fixture
def wrong_gold() -> Callable[[StoredDataset], list[str]]:
    """Ids of the samples with a correct answer that, as letter or text and in either format, does not score 1."""

    def is_wrong(sample: Sample) -> bool:
        parsed = [
            parse_completion(render_answer("seen", answer, template), template).answer
            for answer in (*sample.answers, sample.answer_text)
            for template in TEMPLATES
        ]
        return not all(is_correct(sample, answer) for answer in parsed)

    def check(dataset: StoredDataset) -> list[str]:
        assert len(dataset) > 0
        return [sample.id for sample in dataset.samples if is_wrong(sample)]

    return check
