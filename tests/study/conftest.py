"""Make cells.py importable, provide the small recipe, and run cells in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from medvqa_rl.cli.app import app
from medvqa_rl.study import running

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def given(tiny_folder: Callable[[str], Path]) -> dict[str, Any]:
    from cells import tiny

    return tiny(str(tiny_folder("qwen2_vl")))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run the commands of cells in this process, and record them."""
    called: list[list[str]] = []

    def call(command: Sequence[str], **rest: Any) -> int:
        words = list(command[3:])
        called.append(words)
        try:
            app(words, standalone_mode=False)
        except typer.Exit as error:
            return int(error.exit_code)
        return 0

    monkeypatch.setattr(running.subprocess, "call", call)
    return called
