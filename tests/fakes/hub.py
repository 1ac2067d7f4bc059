"""The routes of the Hugging Face Hub that an upload of a model uses, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_a_secret_token"
LARGE = (".safetensors",)
"""Suffixes of files that are uploaded apart from the commit."""


class Hub:
    """A running Hub."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        """By name: whether it is private, and its files."""
        self.requests: list[str] = []
        """Method and path of each request."""
        self.refused: dict[str, int] = {}
        """Parts of paths that get a status instead of an answer; 0 breaks the connection."""
        self._blobs: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                path = urlsplit(self.path).path
                hub.requests.append(f"{self.command} {path}")
                status = next((code for part, code in hub.refused.items() if part in self.requestline), None)
                if status == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                is_signed = path.startswith("/blobs/") or self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if status is None and not is_signed:
                    status = 401
                if status is not None:
                    self.reply(status, {"error": f"refused with {status}"}, {})
                else:
                    self.reply(*hub.route(self.command, path, body))

            do_GET = do_POST = do_PUT = answer

            def reply(self, status: int, content: Any, headers: dict[str, str]) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def route(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Answer a request: status, JSON and headers."""
        missing = {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        parts = path.strip("/").split("/")
        if parts[0] == "blobs":
            self._blobs[parts[1]] = body
            return 200, {}, {}
        given = json.loads(body) if body and "commit" not in parts else {}
        if path == "/api/repos/create":
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            if name in self.repositories:
                return 409, {"error": "exists", "url": f"{self.url}/{name}"}, {}
            is_private = given.get("private", False) or given.get("visibility") == "private"
            self.repositories[name] = {"private": is_private, "files": {}}
            return 200, {"url": f"{self.url}/{name}"}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.url}/blobs/{one['oid']}"}}} for one in given["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, {}
        name = "/".join(parts[2:4])
        if parts[:2] != ["api", "models"] or name not in self.repositories:
            return 404, *missing
        repository = self.repositories[name]
        if len(parts) == 4 or parts[4] == "revision":
            return 200, {"id": name, "sha": "0" * 40, "private": repository["private"], "siblings": []}, {}
        if parts[4] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in given["files"]
            ]
            return 200, {"files": files}, {}
        assert parts[4] == "commit", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self._blobs[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                repository["files"][value["path"]] = data
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}, {}


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub until the block ends."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.http.shutdown()
        hub.http.server_close()
