"""Result files name the hardware but no machine, and agree with the documentation page.

Run: pytest tests/benchmarks/test_results.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_name_the_hardware_and_no_folder(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    result = json.loads(text)
    assert {"cpu", "threads", "load", "torch", "transformers"} <= result["hardware"].keys()
    assert not re.search(r'"(?:/|~)[^"]*"|://', text)


@pytest.mark.parametrize("name", ["step-embedded-cpu", "step-paper-cpu"])
def test_the_page_shows_the_steps_that_were_measured(name: str) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    ours, trl = result["engines"]["ours"], result["engines"]["trl"]
    assert result["differences"] == []
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    digits = 3 if ours["seconds"] < 5 else 2
    shown = f"| **whole step** | **{ours['seconds']:.{digits}f}** | **{trl['seconds']:.{digits}f}** |"
    assert shown in page and f"**{trl['seconds'] / ours['seconds']:.2f}** |" in page


def test_the_page_shows_the_speedup_of_two_ranks() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "ranks-embedded-cpu.json").read_text(encoding="utf-8"))
    alone, two = result["runs"]
    assert (alone["ranks"], two["ranks"], result["differences"]) == (1, 2, [])
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    waiting = ", ".join(f"{seconds:.2f}" for seconds in two["waiting_seconds"])
    assert f"| {alone['steps_per_second']:.2f} | {two['steps_per_second']:.2f} |" in page
    assert f"| {100 * two['efficiency']:.0f} % |" in page and f"| {waiting} |" in page
