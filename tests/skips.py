"""What is not run, and why: no skip is accepted in CI, and tests on real data are left out where there is none.

The tests' conftest.py has these hooks. ``.ci/run`` sets ``MEDVQA_NO_SKIPS=1``: a skipped test or file then fails with
the reason of the skip, unless it is marked ``gpu``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Published data sets and settings next to the project. They are not part of it."""

NO_CHROMIUM = "Chromium is missing, so no page is tested in a browser: run `apt-get install chromium` as root"

ALL_MUST_RUN = os.environ.get("MEDVQA_NO_SKIPS") == "1"


def refuse_skip(report: Any) -> None:
    """Turn a skip into a failure if all tests must run."""
    if not ALL_MUST_RUN or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = (
        f"{report.nodeid or 'A test'}: {reason}\nMEDVQA_NO_SKIPS=1 allows no skip: install what is missing, or mark "
        "what only a GPU can run with pytest.mark.gpu."
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if item.get_closest_marker("gpu") is None:
        refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    refuse_skip(report)  # a file that skips itself as a module is missing
    return report


def find_chromium() -> str | None:
    """The program, where one is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def pytest_report_header() -> list[str]:
    lines = [] if find_chromium() else [NO_CHROMIUM]
    if not REAL_DATA.is_dir():
        lines.append(f"{REAL_DATA} does not exist, so the tests on real data (fixture shared_data) are left out")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if REAL_DATA.is_dir():
        return
    real = [item for item in items if "shared_data" in getattr(item, "fixturenames", ())]
    items[:] = [item for item in items if item not in real]
    config.hook.pytest_deselected(items=real)
