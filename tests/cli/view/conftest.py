"""Starts the server of ``medvqa-rl view`` in this process, and opens a tab of Chromium."""

from __future__ import annotations

import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).parents[2] / "report"))

from browser import Page, browser

from medvqa_rl.cli.view.server import make_app
from medvqa_rl.report.folder import RunsFolder
from tests.skips import NO_CHROMIUM, find_chromium

TOKEN = "a-token"


class Answer(NamedTuple):
    """An answer of the server."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class Served(NamedTuple):
    """A running server."""

    port: int

    @property
    def address(self) -> str:
        """Of the first page."""
        return f"http://127.0.0.1:{self.port}/{TOKEN}/"

    def send(self, path: str = "", *, data: bytes | None = None, token: str = TOKEN, **headers: str) -> Answer:
        """Send a request; names of headers are written with underscores."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{token}/{path}", data=data, headers=given)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as found:
                return Answer(found.status, found.headers, found.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())


@contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """Serve a folder of runs until the block ends."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = make_app(RunsFolder(folder), TOKEN)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(listening.getsockname()[1])
    server.should_exit = True
    thread.join(timeout=60)
    listening.close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A tab of headless Chromium."""
    if find_chromium() is None:
        pytest.skip(NO_CHROMIUM)
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page
