"""The report in a real browser: it filters, sorts, searches, pages, obeys the keyboard, shows text as text.

Run: pytest tests/report/pages/test_browser.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page
from synthetic import EVIL, make_run

from medvqa_rl.report.pages.report import write_report

pytestmark = pytest.mark.browser

GROUPS = "[...document.querySelectorAll('#entries .entry')]"
STEPS = f"{GROUPS}.map(e => Number(e.querySelector('p').textContent.match(/step (\\d+)/)[1]))"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs with 8 groups each; the second of another scanner."""
    folder = tmp_path_factory.mktemp("browser")
    one, two = make_run(folder / "one"), make_run(folder / "two", steps=60, data={"scanner": "unseen"})
    return write_report([one, two], folder / "report.html")


@pytest.fixture
def page(tab: Page, report: Path) -> Iterator[Page]:
    tab.look(width=1200, theme="light")
    tab.open(report)
    tab.run("document.getElementById('samples').scrollIntoView()")  # keys are for what is seen
    tab.messages.clear()
    yield tab
    assert tab.messages == []  # no error, and nothing that the policy had to block


@pytest.fixture(scope="module")
def data(report: Path) -> dict[str, Any]:
    text = report.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0]
    found: dict[str, Any] = json.loads(text)
    return found


def where(page: Page) -> str:
    return str(page.run("document.getElementById('where').textContent"))


def test_it_pages(page: Page) -> None:
    assert where(page) == "Page 1 of 2 · 16 of 16 questions"
    assert page.run(f"{GROUPS}.length") == 10 and page.run("document.getElementById('previous').disabled")
    page.run("document.getElementById('next').click()")
    assert where(page).startswith("Page 2 of 2") and page.run(f"{GROUPS}.length") == 6
    assert page.run("document.getElementById('next').disabled") and page.run("location.hash") == "#page=2"
    page.press("p")
    assert where(page).startswith("Page 1 of 2")
    page.press("n")
    assert where(page).startswith("Page 2 of 2")


def test_it_filters(page: Page, data: dict[str, Any]) -> None:
    page.choose("outcome", "none")
    shown = page.run("[...document.querySelectorAll('#entries .completion header b')].map(e => e.textContent)")
    assert set(shown) == {"no answer"} and where(page) == "Page 1 of 2 · 16 of 16 questions"
    modality = data["groups"][0]["tags"]["modality"]
    page.choose("outcome", "")
    page.choose("modality", modality)
    wanted = [group for group in data["groups"] if group["tags"]["modality"] == modality]
    assert f"{len(wanted)} of 16 questions" in where(page)
    family = wanted[0]["tags"]["family"]
    page.choose("family", family)
    wanted = [group for group in wanted if group["tags"]["family"] == family]
    assert f"{len(wanted)} of 16 questions" in where(page)
    page.choose("run", "1")
    wanted = [group for group in wanted if group["run"] == 1]
    expected = f"· {len(wanted)} of 16 questions" if wanted else "No question matches"
    assert expected in where(page)


def test_it_sorts(page: Page) -> None:
    assert page.run(STEPS) == [60] * 4 + [40] * 4 + [30] * 2
    page.choose("sort", "old")
    assert page.run(STEPS) == [20] * 4 + [30] * 4 + [40] * 2


def test_it_searches_what_is_typed(page: Page) -> None:
    page.press("/")
    assert page.run("document.activeElement.id") == "q"
    for key in "step 30.":
        page.press(key)
    assert where(page) == "Page 1 of 1 · 4 of 16 questions" and page.run(STEPS) == [30] * 4
    page.press("n")  # a letter in the search, not a command
    assert where(page) == "No question matches: relax the search or the filters."


def test_a_link_keeps_the_view(page: Page, report: Path) -> None:
    page.open(report, "#sort=old&outcome=wrong&page=2")
    assert where(page).startswith("Page 2 of 2") and page.run("document.getElementById('outcome').value") == "wrong"
    page.run("document.querySelector('nav a').click()")
    assert page.run("document.getElementById('outcome').value") == "wrong"
    page.open(report, "#sort=nonsense&page=-7&outcome=x")
    assert where(page) == "No question matches: relax the search or the filters."


def test_the_keyboard_walks_through_the_questions(page: Page) -> None:
    index = f"{GROUPS}.indexOf(document.activeElement)"
    page.press("j")
    page.press("j")
    assert page.run(index) == 1
    page.press("k")
    assert page.run(index) == 0


def test_a_completion_with_a_script_shows_as_text(page: Page) -> None:
    texts = page.run("[...document.querySelectorAll('#entries .completion .text')].map(e => e.textContent)")
    shown = EVIL.encode("utf-8", "replace").decode()
    assert sum(text.startswith("<think>It is </script><script>") for text in texts) == 10
    assert any(shown[:-1] in text for text in texts)
    assert page.run("document.title") == "Report: one, two"
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.run("document.querySelectorAll('.entry script, .entry [onerror]').length") == 0


def test_images_are_shown(page: Page) -> None:
    assert page.run(
        "[...document.querySelectorAll('.entry img')].every(i => i.complete && i.naturalWidth > 0 && i.alt)"
    )


def test_every_control_has_a_name(page: Page) -> None:
    unnamed = "[...document.querySelectorAll('input, select')].filter(e => !e.labels.length).length"
    assert page.run(unnamed) == 0
    assert page.run(
        "[...document.querySelectorAll('svg:not([aria-hidden])')].every(e => e.getAttribute('aria-label'))"
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_the_window(page: Page, report: Path, tmp_path: Path, width: int, theme: str) -> None:
    page.look(width=width, theme=theme)
    page.open(report)
    assert page.run("document.documentElement.scrollWidth") == width
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[theme]
    page.screenshot(tmp_path / "page.png")


def test_it_opens_with_groups_whose_rewards_differ(tab: Page, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    newest = max((run / "samples").iterdir())
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    newest.write_text("".join(json.dumps(row | {"reward": 1.0}) + "\n" for row in rows))
    tab.open(write_report([run], tmp_path / "report.html"))
    assert tab.run(STEPS) == [20] * 4 + [40] * 4
    tab.run("document.getElementById('sort').value = 'new'")
    tab.run("document.getElementById('sort').dispatchEvent(new Event('input', {bubbles: true}))")
    tab.run("document.getElementById('sort').dispatchEvent(new Event('change', {bubbles: true}))")
    assert tab.run(STEPS) == [40] * 4 + [20] * 4
