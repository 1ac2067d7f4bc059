"""The rating sheet in a real browser: it is filled in by keyboard, keeps what is said, and saves a file.

Run: pytest tests/report/pages/test_rating_sheet_browser.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PATIENCE, Page
from synthetic import write_evaluation

from medvqa_rl.cli.judge.rate import run_sheet
from medvqa_rl.evaluation.judging.ratings import Rating, read_key, read_ratings

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sheet")
    one, two = (write_evaluation(folder, name, same=6) for name in ("before", "after_training"))
    run_sheet([one, two], output=folder / "sheet.html", questions=3)
    return folder / "sheet.html"


@pytest.fixture
def page(tab: Page, sheet: Path) -> Iterator[Page]:
    tab.look(width=1100, theme="light")
    tab.open(sheet)
    tab.run("localStorage.clear()")
    tab.open(sheet)
    tab.messages.clear()
    yield tab
    assert tab.messages == []  # no error, and nothing that the policy had to block


def text(page: Page, id: str) -> str:
    return str(page.run(f"document.getElementById('{id}').textContent"))


def test_it_is_filled_in_kept_and_saved(page: Page, sheet: Path, tmp_path: Path) -> None:
    count = page.run("JSON.parse(document.getElementById('data').textContent).items.length")
    assert text(page, "where") == f"Answer 1 of {count}" and text(page, "done") == f"0 of {count} rated"
    page.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.run("document.getElementById('save').click()")
    assert "Enter your name" in text(page, "problem") and page.run("document.activeElement.id") == "rater"
    for key in "Ann 1":
        page.press(key)
    page.press("Escape")
    for key in ("y", "3", "c"):
        page.press(key)
    for key in "fine, y":  # letters of a comment are no commands
        page.press(key)
    page.press("Escape")
    page.press("j")
    assert text(page, "where") == f"Answer 2 of {count}"
    for key in ("n", "0", "n"):
        page.press(key)
    assert text(page, "done") == f"2 of {count} rated"
    page.open(sheet)  # a closed tab loses nothing, and one goes on where one was
    assert text(page, "done") == f"2 of {count} rated" and text(page, "where") == f"Answer 3 of {count}"
    page.press("k")
    assert page.run("document.querySelector('input[name=correct]:checked').value") == "no"
    page.press("f")
    for key in ("u", "x"):
        page.press(key)
    page.run("document.getElementById('save').click()")
    assert f"Saved with {count - 3} still unrated" in text(page, "problem") or count == 3
    deadline = time.monotonic() + PATIENCE
    while not (found := list(tmp_path.glob("ratings-*.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    key = read_key(sheet.with_suffix(".key.json"))
    assert [path.name for path in found] == [f"ratings-Ann-1-{key.sheet}.json"]
    saved = read_ratings(found[0], key)
    assert saved.rater == "Ann 1"
    assert saved.ratings == {"1": Rating(True, 3, "fine, y"), "2": Rating(False, 0), "3": Rating(None, None)}
    page.run("document.getElementById('forget').click()")
    assert text(page, "done") == f"3 of {count} rated", "asked once more"
    page.run("document.getElementById('forget').click()")
    page.open(sheet)
    assert text(page, "done") == f"0 of {count} rated" and page.run("document.getElementById('rater').value") == ""


def test_texts_show_as_text_and_images_are_there(page: Page) -> None:
    for id in ("question", "reasoning"):
        assert "</script><script>document.title = 'owned'" in text(page, id)
    assert str(page.run("document.title")).startswith("Rating sheet")
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.run("document.querySelectorAll('#item script, #item [onerror]').length") == 0
    assert page.run("[...document.querySelectorAll('#images img')].every(i => i.complete && i.naturalWidth > 0)")


@pytest.mark.parametrize(("width", "theme"), [(360, "light"), (1100, "dark")])
def test_it_fits_the_window(page: Page, sheet: Path, tmp_path: Path, width: int, theme: str) -> None:
    page.look(width=width, theme=theme)
    page.open(sheet)
    assert page.run("document.documentElement.scrollWidth") == width
    page.screenshot(tmp_path / "sheet.png", whole=True)
