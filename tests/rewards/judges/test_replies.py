"""Replies of judges' servers: read field by field, and bounded in time and size.

Run: pytest tests/rewards/judges/test_replies.py
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.config import JudgeConfig
from medvqa_rl.rewards.judges.endpoint import EndpointJudge
from medvqa_rl.rewards.judges.protocol import Grade, JudgeRequest
from medvqa_rl.rewards.judges.replies import MAX_BYTES, Completion, MalformedReply, read_completion
from medvqa_rl.rewards.judges.rubric import COHERENCE

KEY = "sk-secret-4711"


def reply(content: Any = "Yes", **changes: Any) -> bytes:
    value = {"choices": [{"message": {"content": content}}], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}
    return json.dumps(value | changes).encode()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (reply(), ("Yes", 7, 1)),
        (reply(None), (None, 7, 1)),
        (reply([{"type": "text", "text": "Ye"}, {"type": "image"}, {"type": "text", "text": "s"}]), ("Yes", 7, 1)),
        (reply(usage=None), ("Yes", 0, 0)),
        (reply(usage={"prompt_tokens": "many", "completion_tokens": True}), ("Yes", 0, 0)),
        (reply(usage={"prompt_tokens": -1, "completion_tokens": 10**30}), ("Yes", 0, 0)),
        (reply().decode().encode("utf-16"), ("Yes", 7, 1)),
    ],
)
def test_a_chat_completion_is_read(body: bytes, expected: Completion) -> None:
    assert read_completion(body) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"9" * 5000, "not JSON"),  # Python refuses integers of so many digits
        (b"\xff", "not JSON"),
        (b"7", "no choices"),
        (reply(choices=7), "no choices"),
        (reply(choices=[]), "no choices"),
        (reply(choices=["x"]), "no message"),
        (reply(choices=[{"message": "Yes"}]), "no message"),
        (reply(7), "neither text nor parts"),
        (reply(["Yes"]), "neither text nor parts"),
        (reply([]), "neither text nor parts"),
        (reply([{"type": "text", "text": 1}]), "neither text nor parts"),
        (reply({"a": 1}), "neither text nor parts"),
    ],
)
def test_anything_else_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(MalformedReply, match=message):
        read_completion(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "type", "text", "usage"]), inner, max_size=4
        )
    ),
)


@given(JSON | st.fixed_dictionaries({"choices": st.lists(st.fixed_dictionaries({"message": JSON}) | JSON)}))
def test_any_json_is_read_or_refused(value: Any) -> None:
    try:
        text, prompt_tokens, completion_tokens = read_completion(json.dumps(value).encode())
    except MalformedReply:
        return
    assert text is None or isinstance(text, str)
    assert prompt_tokens >= 0 and completion_tokens >= 0


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"


@pytest.fixture
def ask() -> Iterator[Callable[..., Grade]]:
    """Asks a judge once, whose server sends the given pieces with a pause before each."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(pieces: list[bytes], pause: float) -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                try:
                    for piece in pieces:
                        time.sleep(pause)
                        connection.sendall(piece)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # closing with unread bytes would reset the connection
                        pass
                except OSError:
                    pass  # the client hung up

        def ask_once(*pieces: bytes, pause: float = 0.0) -> Grade:
            threading.Thread(target=answer, args=(list(pieces), pause), daemon=True).start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            config = JudgeConfig(model="m", endpoint=url, timeout=0.5, max_retries=0)
            (grade,) = EndpointJudge(config, KEY, COHERENCE).grade([JudgeRequest("Is it?", (), "It is.")])
            return grade

        yield ask_once


@pytest.mark.parametrize(
    "head", [HEAD + b"Content-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\n"], ids=["body", "head"]
)
def test_the_time_limit_covers_the_whole_request(ask: Callable[..., Grade], head: bytes) -> None:
    began = time.monotonic()
    piece = b" " if head.endswith(b"\r\n\r\n") else b"X-A: b\r\n"
    assert ask(head, *[piece] * 30, pause=0.1).reason == "no answer within 0.5 seconds"
    assert time.monotonic() - began < 2.0  # each read alone took 0.1 s, all of them 3 s


def test_a_long_reply_is_refused_while_it_arrives(ask: Callable[..., Grade]) -> None:
    endless = (HEAD + b"Content-Length: 3000000000\r\n\r\n", *[b"x" * 100_000] * (MAX_BYTES // 100_000 + 2))
    assert ask(*endless).reason == "the answer is no chat completion: it is longer than 1,000,000 bytes"


def test_a_compressed_reply_is_refused(ask: Callable[..., Grade]) -> None:
    grade = ask(HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(reply()))
    assert grade.reason == "the answer is no chat completion: it is compressed"


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"\r\n" + reply(f"I know {KEY}."),
        b'HTTP/1.1 401 X\r\nContent-Type: application/json\r\n\r\n{"error": {"message": "bad key %s"}}' % KEY.encode(),
    ],
    ids=["content", "error"],
)
def test_a_key_that_the_server_repeats_is_not_stored(ask: Callable[..., Grade], answer: bytes) -> None:
    reason = ask(answer).reason
    assert KEY not in reason and "[key]" in reason
