"""The server of ``medvqa-rl view``, for attacks: its answers without a network, and its pages for a browser."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn

from medvqa_rl.cli.view.server import make_app
from medvqa_rl.report.folder import RunsFolder

_TOKEN = "key"


def answers(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Path, status and text of everything that the pages of a folder's runs ask for. Defects raise."""
    app = make_app(RunsFolder(folder), _TOKEN)
    yield "", *_get(app, "", "")
    for name in RunsFolder(folder).find():
        run = urlencode({"run": name})
        for path in ("runs", "groups", "ask"):
            yield path, *_get(app, path, run)
        _, page = _get(app, "runs", run)
        for value in re.findall(r"<option(?: selected)?>(.*?)</option>", page)[:3]:
            yield "answers", *_get(app, "answers", f"{run}&{urlencode({'eval': value})}")


def _get(app: Any, path: str, query: str) -> tuple[int, str]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    full = f"/{_TOKEN}/{path}"
    scope = {
        "type": "http",
        "method": "GET",
        "path": full,
        "raw_path": full.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(b"host", b"127.0.0.1")],
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode("utf-8", "replace")


@contextmanager
def serve(folder: Path, *, without_policy: bool = False) -> Iterator[str]:
    """Serve a folder and give the address of its first page."""
    inner = make_app(RunsFolder(folder), _TOKEN)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def send_stripped(message: Any) -> None:
            if message["type"] == "http.response.start":
                gone = (b"content-security-policy", b"content-length")
                message["headers"] = [(name, value) for name, value in message["headers"] if name not in gone]
            elif b"Content-Security-Policy" in message.get("body", b""):
                message["body"] = re.sub(rb'<meta http-equiv="Content-Security-Policy"[^>]*>', b"", message["body"])
            await send(message)

        await inner(scope, receive, send_stripped if without_policy else send)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/{_TOKEN}/"
        server.should_exit = True
        thread.join(timeout=30)
