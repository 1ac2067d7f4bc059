"""What stands before every page of ``medvqa-rl view``: only this machine, only who knows the address, and nothing that
another page could start or embed. Imports no torch."""

from __future__ import annotations

import re
from secrets import compare_digest

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medvqa_rl.core.network import is_loopback

MAX_BODY = 64_000_000
"""Bytes of a request, which hold an uploaded image."""

HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'; object-src 'none'; base-uri 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address is the key
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer; a page's own policy, with the hashes of its script and style, stands in the page."""


_HOST = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d+)?")
"""Name or address, and port."""


class Guard:
    """Refuses requests without the token as the first part of their path, under another host name than this machine's
    (a name that an attacker points at it, DNS rebinding), and writes that another page sends."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        answer = self._app if refusal is None else PlainTextResponse(refusal[1], status_code=refusal[0])
        await answer(scope, _limited(receive), send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for a request that is refused."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _HOST.fullmatch(host)
        if name is None or not is_loopback(name[1]):
            return 421, "This server answers under 127.0.0.1 and localhost only."
        if not compare_digest(scope["path"].lstrip("/").partition("/")[0].encode(), self._token):
            return 404, "Open the address that `medvqa-rl view` printed when it started: it has a key."
        if scope["method"] not in ("GET", "HEAD") and headers.get("origin") != f"http://{host}":
            return 403, "Only the pages of this server may ask."
        if int(headers.get("content-length", "0")) > MAX_BODY:
            return 413, _TOO_LARGE
        return None


_TOO_LARGE = f"The request has more than {MAX_BODY // 1_000_000} MB: give a smaller image."


def _limited(receive: Receive) -> Receive:
    """Receive at most :data:`MAX_BODY` bytes, whatever the request says of its length."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return limited
