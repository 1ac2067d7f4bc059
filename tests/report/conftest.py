"""Makes the run folders of synthetic.py and the browser of browser.py importable here, and opens a tab."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from browser import Page, browser

from tests.skips import NO_CHROMIUM, find_chromium


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A tab of headless Chromium."""
    if find_chromium() is None:
        pytest.skip(NO_CHROMIUM)
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page
