"""The pages of ``medvqa-rl view`` in a real browser: they load, filter, follow a run, compare, and cannot be embedded.

Run: pytest tests/cli/view/test_browser.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from browser import Page
from synthetic import EVIL, make_run, step_row, write, write_eval, write_evaluation

from medvqa_rl.report.pages.report import write_report
from tests.cli.view.conftest import Served, serve

pytestmark = pytest.mark.browser

SHOWN = "[...document.querySelectorAll('#a-entries .entry')]"
LOADED = "document.getElementById('a-where').textContent.startsWith('Page')"
STEP = "document.getElementById('status').textContent"
HOME = {"before": "before_home (phantom/home/test)", "after": "after_home (phantom/home/test)"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browse") / "runs"
    for name in ("first", "study/grpo"):
        run = make_run(root / name)
        for one in ("before_home", "after_home"):
            write_evaluation(run / "eval", one, 24)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Served]:
    with serve(root) as served:
        yield served


@pytest.fixture
def page(tab: Page) -> Iterator[Page]:
    tab.look(width=1400, theme="light")
    tab.messages.clear()
    yield tab
    assert tab.messages == []


def where(page: Page) -> str:
    return str(page.run("document.getElementById('a-where').textContent"))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1400])
def test_pages_fit_the_window(page: Page, server: Served, width: int, theme: str) -> None:
    page.look(width=width, theme=theme)
    for path in ("", "runs?run=first", "runs?run=first&run=study/grpo"):
        page.open(server.address + path)
        if path:
            page.wait_for(LOADED)
        assert page.run("document.documentElement.scrollWidth") == width
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[theme]
        unnamed = (
            "[...document.querySelectorAll('input, select')].filter(e => !e.labels.length && !e.ariaLabel).length"
        )
        assert page.run(unnamed) == 0


def test_the_browser_of_the_server_shows_what_the_file_shows(page: Page, server: Served, root: Path) -> None:
    """The server chooses in Python, the file in its script."""
    report = write_report([root / "first"], root.parent / "report.html")
    seen = set()
    for state in (
        {},
        {"eval": HOME["after"], "against": HOME["before"], "flip": "changed", "page": "2"},
        {"eval": HOME["before"], "outcome": "wrong", "answer": "no"},
        {"eval": HOME["after"], "group": "answer_type: closed", "q": "is seen"},
        {"eval": "step 40 (phantom/home/val)", "outcome": "right"},
        {"eval": HOME["after"], "q": "no such words"},
    ):
        fragment = "#" + urlencode({f"a-{name}": value for name, value in state.items()})
        found = []
        for address in (report, server.address + "runs?run=first"):
            page.open(address, fragment)
            page.wait_for("!['', 'Loading …'].includes(document.getElementById('a-where').textContent)")
            page.run("document.querySelectorAll('.entry a').forEach(e => e.remove())")  # only the server can be asked
            found.append((where(page), page.run(f"{SHOWN}.map(e => e.textContent)")))
        assert found[0] == found[1]
        seen.add(found[0][0])
    assert len(seen) == 6


def test_images_and_hostile_texts_are_shown_as_such(page: Page, server: Served) -> None:
    page.open(server.address + "runs?run=first")
    page.wait_for(LOADED)
    page.wait_for(f"{SHOWN}.every(e => e.querySelector('img').naturalWidth > 0)")
    shown = EVIL.encode("utf-8", "replace").decode()
    assert shown[:-1] in page.run(f"{SHOWN}[0].querySelector('.text').textContent")
    assert page.run("document.title") == "first" and page.run("document.querySelectorAll('main script').length") == 0
    page.wait_for("document.querySelectorAll('#entries .entry').length === 8")  # groups of training
    assert page.run("[...document.querySelectorAll('#entries img')].length") == 8


def test_runs_are_chosen_and_compared(page: Page, server: Served) -> None:
    page.open(server.address)
    page.run("document.querySelectorAll('input[type=checkbox]').forEach(e => e.click())")
    page.run("document.querySelector('button').click()")
    page.wait_for("document.title === 'first, study/grpo' && document.getElementById('a-against')")
    page.wait_for(LOADED)
    assert page.run("document.getElementById('a-eval').value") == f"study/grpo: {HOME['after']}"
    assert page.run("document.getElementById('a-against').value") == f"first: {HOME['after']}"
    assert where(page) == "Page 1 of 3 · 24 of 24 questions"
    page.choose("a-flip", "changed")
    page.wait_for("document.getElementById('a-where').textContent.startsWith('No question matches')")


def test_a_page_follows_its_run(page: Page, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "live", state="running")
    status = json.loads((run / "status.json").read_text())
    with serve(tmp_path / "runs") as server:
        page.open(server.address + "runs?run=live")
        page.wait_for(f"{STEP}.includes('step 40 of 40')")
        page.wait_for(LOADED)
        assert page.run("document.getElementById('a-eval').options.length") == 2
        page.run("document.querySelector('#settings summary').click()")
        curve = page.run("document.querySelector('#curves svg:not(.mark) path').getAttribute('d')")
        page.choose("a-outcome", "wrong")
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(step_row(step)) + "\n" for step in range(41, 51))
        write_eval(run / "eval" / "step_000050", [True] * 20)
        write(run / "status.json", status | {"step": 50, "steps": 90})
        page.wait_for(f"{STEP}.includes('step 50 of 90, no update for')")
        assert page.run("document.querySelector('#curves svg:not(.mark) path').getAttribute('d')") != curve
        assert "step 50" in page.run("document.getElementById('accuracy').textContent")
        assert page.run("document.getElementById('a-eval').options.length") == 3
        assert page.run("document.getElementById('a-eval').value") == "step 40 (phantom/home/val)"
        assert page.run("document.querySelector('#settings details').open")
        assert page.run("document.getElementById('a-outcome').value") == "wrong"
        assert page.run("document.getElementById('gone').hidden")
        run.rename(run.with_name("moved"))
        page.wait_for("!document.getElementById('gone').hidden")
        assert page.run("document.getElementById('gone').textContent").startswith("There is no run 'live' below")
        run.with_name("moved").rename(run)
        page.wait_for("document.getElementById('gone').hidden")
    page.wait_for("!document.getElementById('gone').hidden")
    assert page.run("document.getElementById('gone').textContent").startswith("The server does not answer: start")
    page.messages = [message for message in page.messages if "404" not in message]
    assert {message.split(" ")[-1] for message in page.messages} == {"net::ERR_CONNECTION_REFUSED"}
    page.messages.clear()


def test_the_list_follows_its_runs(page: Page, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with serve(tmp_path / "runs") as server:
        page.open(server.address)
        assert "There is no run in this folder yet" in page.run("document.body.textContent")
        make_run(tmp_path / "runs" / "new")
        page.wait_for("document.querySelector('.runs') !== null")
        page.run("document.querySelector('input').click()")
        make_run(tmp_path / "runs" / "newer")
        page.wait_for("document.querySelectorAll('.runs input').length === 2")
        assert page.run("[...document.querySelectorAll('input:checked')].map(e => e.value)") == ["new"]


def test_no_other_page_can_embed_it(tab: Page, server: Served, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    other.write_text(f'<iframe src="{server.address}"></iframe>', encoding="utf-8")
    tab.messages.clear()
    tab.open(other)
    tab.wait_for("document.querySelector('iframe').contentDocument === null")
    assert any("frame-ancestors" in message or "X-Frame-Options" in message for message in tab.messages), tab.messages
    tab.messages.clear()
