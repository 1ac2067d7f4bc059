"""``medvqa-rl models`` lists what can be trained, and docs/models.md has the same table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import ModelConfig
from medvqa_rl.learning.estimate.architecture import find_architecture
from medvqa_rl.models.families import family_for
from medvqa_rl.models.families.costs import family_at, image_rule
from medvqa_rl.models.families.published import CHECKPOINTS, SIZES, size_of
from medvqa_rl.models.families.shared import SharedFamily

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    result = CliRunner().invoke(app, ["models", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_page_has_the_table_that_the_command_prints(rows: list[dict]) -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    def mark(value: bool) -> str:
        return "yes" if value else ""

    expected = [
        f"| `{row['checkpoint']}` | {row['family']} | {number(row['parameters'])} | {number(row['lora'])} | "
        f"{number(row['full'])} | {mark(row['medical'])} | {row['licence']} | {mark(row['gated'])} |"
        for row in rows
    ]
    lines = [" ".join(line.split()) for line in PAGE.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if line.startswith("| `") and "/" in line.split("|")[1]] == [
        " ".join(line.split()) for line in expected
    ]


def test_every_checkpoint_has_a_family_and_a_cost(rows: list[dict]) -> None:
    for checkpoint, row in zip(CHECKPOINTS, rows, strict=True):
        family = family_for(checkpoint.model_type)
        assert family is not None and row["family"] == family.title
        assert (row["lora"] is None) == (not isinstance(family, SharedFamily))
        if checkpoint.size is not None:
            assert SIZES[checkpoint.size]["model_type"] == checkpoint.model_type
            assert row["lora"] < row["full"]


def test_a_published_name_stands_for_its_files() -> None:
    model = ModelConfig(path="Qwen/Qwen3-VL-2B-Instruct", max_pixels=524288)
    assert size_of(model.path) == "qwen3-2b"
    assert find_architecture(model, None) == find_architecture(ModelConfig(), "qwen3-2b")
    rule, where = image_rule(model)
    assert rule.tokens(1024, 512) == 512 and where == "as published with Qwen3-VL"  # units of 32 pixels
    assert image_rule(ModelConfig(), "gemma3-4b")[0].tokens(1000, 300) == 256
    family = family_at(model)
    assert family is not None and family.title == "Qwen3-VL"
    assert family_at(ModelConfig(path="some/model-nobody-has")) is None
