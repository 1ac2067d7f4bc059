"""Replies of a judge's server, which is not trusted: bounded in time and size, and checked field by field."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

MAX_BYTES = 1_000_000
"""Longest reply: hundreds of times a grade with its reason."""
T = TypeVar("T")


class MalformedReply(RuntimeError):
    """A reply that is not a chat completion."""


class OutOfTime(RuntimeError):
    """A request was not answered in time."""


class Completion(NamedTuple):
    """What is read of a chat completion."""

    text: str | None
    prompt_tokens: int
    completion_tokens: int


def read_completion(body: bytes) -> Completion:
    """Read a chat completion. A content of several parts is joined; token counts that are no numbers count as 0.

    Raises:
        MalformedReply: it is not JSON, or not a chat completion.
    """
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedReply("it is not JSON") from error
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices:
        raise MalformedReply("it has no choices")
    message = choices[0].get("message") if isinstance(choices[0], dict) else None
    if not isinstance(message, dict):
        raise MalformedReply("its first choice has no message")
    usage = reply.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Completion(
        _text(message.get("content")), _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))
    )


def read_models(body: bytes) -> list[str]:
    """The names in a server's list of models; empty if it is no such list."""
    try:
        listed = json.loads(body)
    except (ValueError, RecursionError):
        return []
    rows = listed.get("data") if isinstance(listed, dict) else None
    names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [name for name in names if isinstance(name, str) and name]


def _text(content: Any) -> str | None:
    """The text of a message's content: text, null, or a list of parts of which some have a text."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part["text"] for part in content if part.get("type") == "text" and isinstance(part.get("text"), str)]
        if texts:
            return "".join(texts)
    raise MalformedReply("the content of its message is neither text nor parts with text")


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 10**9 else 0


def bounded_client(base: type[Any], seconds: float, **options: Any) -> Any:
    """Make an HTTP client whose requests end after ``seconds``, whatever the server does, and whose replies have at
    most :data:`MAX_BYTES`.

    The time-outs of HTTP clients bound each read, so a server that sends a byte now and then holds a request for ever.
    A request therefore runs in a thread of its own, which is abandoned when the time is over.

    Args:
        base: the client's class, ``httpx.Client`` or one with its interface.
        seconds: time for a whole request.
        options: arguments of the class.

    Returns:
        The client. It raises :class:`OutOfTime` and :class:`MalformedReply`.
    """

    class BoundedClient(base):  # type: ignore[misc]
        def send(self, request: Any, *, stream: bool = False, **more: Any) -> Any:
            end = time.monotonic() + seconds
            return _within(
                seconds, lambda: _read_whole(super(BoundedClient, self).send(request, stream=True, **more), end)
            )

    return BoundedClient(**options)


def _within(seconds: float, work: Callable[[], T]) -> T:
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001  (raised by the caller)
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(timeout=seconds)
    except TimeoutError as error:
        raise OutOfTime from error


def _read_whole(response: Any, end: float) -> Any:
    """Read a streamed response until its end, and return it as one that has been read."""
    body = bytearray()
    try:
        # Compression was not requested: what is small on the wire may be gigabytes in memory.
        if response.headers.get("content-encoding", "identity") != "identity":
            raise MalformedReply("it is compressed")
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MAX_BYTES:
                raise MalformedReply(f"it is longer than {MAX_BYTES:,} bytes")
            if time.monotonic() > end:
                raise OutOfTime
    finally:
        response.close()
    return type(response)(
        response.status_code, headers=response.headers, content=bytes(body), request=response.request
    )
