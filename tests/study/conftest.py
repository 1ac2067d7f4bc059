"""Makes cells.py importable here, and gives the small recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def given(tiny_folder: Callable[[str], Path]) -> dict[str, Any]:
    from cells import tiny

    return tiny(str(tiny_folder("qwen2_vl")))
