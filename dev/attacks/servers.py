"""A judge's server that misbehaves: every answer is a grade or a failure with a reason, in bounded time and memory."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import resource
import signal
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from . import children
from .mutations import mutate_bytes, mutate_json

TIMEOUT, ATTEMPTS = 1.5, 2
ALLOWED = TIMEOUT * ATTEMPTS + 15.0
"""Seconds that a request may take on a busy machine, waits aside."""
FOREVER = 60.0
"""Seconds that a server goes on which does not end."""
MEMORY = 2**30
KEY = "sk-secret-4711"
Reply = Callable[[socket.socket], None]


def reply(content: Any = "Yes", **changes: Any) -> bytes:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": content}
    value = {
        "id": "x", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}, **changes,
    }  # fmt: skip
    return json.dumps(value).encode()


def send(body: bytes, status: int = 200, **headers: str) -> Reply:
    given = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return lambda connection: connection.sendall(head.encode() + b"\r\n" + body)


def raw(data: bytes) -> Reply:
    return lambda connection: connection.sendall(data)


def drip(head: bytes, piece: bytes, pause: float) -> Reply:
    """Send a piece again and again, each within the time-out of a read."""

    def act(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(int(FOREVER / pause)):
            connection.sendall(piece)
            time.sleep(pause)

    return act


def flood(head: bytes, piece: bytes, most: int) -> Reply:
    def act(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(most // len(piece)):
            connection.sendall(piece)

    return act


def _bomb() -> bytes:
    squeeze, block = zlib.compressobj(9, zlib.DEFLATED, 31), b"\0" * 2**20
    return b"".join([squeeze.compress(b'{"x": "'), *(squeeze.compress(block) for _ in range(3000)), squeeze.flush()])


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BEHAVIOURS: dict[str, Reply] = {
    "good": send(reply()), "parts": send(reply([{"type": "text", "text": "Yes"}])),
    "garbage": raw(b"\0\xff\x80\r\n\r\n"), "closed": raw(b""), "half-a-head": raw(b"HTTP/1.1 200"), "empty": send(b""),
    "html": send(b"<html>502</html>", Content_Type="text/html"), "half-json": send(reply()[:50]), "reset": _reset,
    "too-long": send(reply(), Content_Length="99999"), "too-short": send(reply(), Content_Length="20"),
    "negative-length": send(reply(), Content_Length="-5"), "huge-length": send(reply(), Content_Length=str(10**30)),
    "broken-chunks": raw(_HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n"),
    "endless-chunk": raw(_HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx"),
    "gzip-bomb": send(_bomb(), Content_Encoding="gzip"), "not-gzip": send(reply(), Content_Encoding="gzip"),
    "gzip-of-garbage": send(gzip.compress(b"\xff" * 100), Content_Encoding="gzip"),
    "3-gigabytes": flood(_HEAD + b"Content-Length: 3000000000\r\n\r\n", b"x" * 2**20, 3_000_000_000),
    "slow-body": drip(_HEAD + b"Content-Length: 100000\r\n\r\n", b" ", 0.5),
    "slow-head": drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 0.5), "silent": lambda connection: time.sleep(FOREVER),
    "endless-head": flood(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"b" * 1000 + b"\r\n", 300_000_000),
    "redirect": send(b"", 307, Location="http://192.0.2.1/v1/chat/completions"),
    "retry-in-30-years": send(b"{}", 429, Retry_After="1e9"), "retry-nan": send(b"{}", 429, Retry_After="nan"),
    "500": send(b"x", 500), "401-with-key": send(b'{"error": {"message": "bad key %s"}}' % KEY.encode(), 401),
    "401-long": send(b'{"error": {"message": "' + b"x" * 10**6 + b'"}}', 401), "204": send(b"", 204),
    "999": send(reply(), 999),
    "100-forever": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.3),
    "null": send(b"null"), "list": send(b"[]"), "number": send(b"7"), "text": send(b'"Yes"'),
    "choices-null": send(reply(choices=None)), "choices-empty": send(reply(choices=[])),
    "choices-7": send(reply(choices=7)),
    "choice-text": send(reply(choices=["x"])), "no-message": send(reply(choices=[{"index": 0}])),
    "content-null": send(reply(None)), "content-7": send(reply(7)), "content-list": send(reply(["Yes"])),
    "content-object": send(reply({"a": 1})), "content-20-mb": send(reply("Yes" * 7_000_000)),
    "content-surrogate": send(reply("\ud800")), "content-key": send(reply(f"No idea. {KEY}")),
    "deep-json": send(b"[" * 200_000 + b"]" * 200_000), "deep-content": send(reply("[" * 100_000)),
    "usage-text": send(reply(usage={"prompt_tokens": "many", "completion_tokens": None, "total_tokens": []})),
    "usage-huge": send(reply(usage={"prompt_tokens": 10**30, "completion_tokens": 1, "total_tokens": 1})),
    "usage-nan": send(reply().replace(b'"prompt_tokens": 1', b'"prompt_tokens": NaN')),
    "huge-integer": send(reply().replace(b'"created": 1', b'"created": ' + b"9" * 6000)),
    "events": send(b"data: " + reply() + b"\n\ndata: [DONE]\n\n", Content_Type="text/event-stream"),
    "utf-16": send(reply().decode().encode("utf-16"), Content_Type="application/json; charset=utf-16"),
    "unknown-charset": send(reply(), Content_Type="application/json; charset=nonsense"),
}  # fmt: skip


def _serve(listener: socket.socket, behaviours: dict[str, Reply]) -> None:
    """Answer ``/NAME/...`` as ``behaviours[NAME]`` does."""

    def answer(connection: socket.socket) -> None:
        try:
            connection.settimeout(FOREVER)
            data = b""
            while b"\r\n\r\n" not in data:
                if not (more := connection.recv(65536)):
                    return
                data += more
            head, _, body = data.partition(b"\r\n\r\n")
            lengths = [
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
            ]
            while len(body) < sum(lengths) and (more := connection.recv(65536)):
                body += more
            behaviours[head.split(b" ", 2)[1].decode().split("/")[1]](connection)
        except OSError:
            pass  # the client hung up
        finally:
            connection.close()

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def _ask(port: int, name: str) -> list[str]:
    """Grade on both rubrics; returns what is wrong."""
    from medvqa_rl.config import JudgeConfig
    from medvqa_rl.rewards.judges.endpoint import EndpointJudge
    from medvqa_rl.rewards.judges.rubric import COHERENCE, CORRECTNESS

    endpoint = f"http://127.0.0.1:{port}/{name}/v1"
    config = JudgeConfig(model="m", endpoint=endpoint, timeout=TIMEOUT, max_retries=ATTEMPTS - 1, concurrency=1)
    wrong = []
    for rubric in (COHERENCE, CORRECTNESS):
        waits: list[float] = []
        judge = EndpointJudge(config, KEY, rubric, sleep=waits.append)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            (grade,) = judge.grade(rubric.probes[:1])
            if math.isnan(grade.score) and not grade.reason:
                wrong.append("failed without a reason")
            if KEY in grade.reason:
                wrong.append("the reason holds the key")
            if len(grade.reason) > 1000:
                wrong.append(f"a reason of {len(grade.reason)} characters")
        except BaseException as error:  # noqa: BLE001  (any error here is a fault)
            wrong.append(f"{type(error).__name__}: {str(error)[:100]}")
        seconds = time.monotonic() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if seconds > ALLOWED:
            wrong.append(f"took {seconds:.1f} s")
        if grown > MEMORY:
            wrong.append(f"needed {grown / 2**30:.1f} GiB")
        if max(waits, default=0) > 60:
            wrong.append(f"waits {max(waits):.0f} s")
        try:
            judge.check(lambda line: None)
        except ValueError as error:
            if KEY in str(error) or len(str(error)) > 3000:
                wrong.append("the refusal holds the key, or is too long")
        except BaseException as error:  # noqa: BLE001  (any other error here is a fault)
            wrong.append(f"check: {type(error).__name__}: {str(error)[:100]}")
    return wrong


def main(options: argparse.Namespace) -> bool:
    """Ask every server, and one with ``options.inputs`` / 10 mutated answers; returns whether all held."""
    import openai  # noqa: F401

    out = options.out / "servers"
    out.mkdir(parents=True, exist_ok=True)
    rng, mutated = random.Random(options.seed), dict[str, bytes]()
    for number in range(max(10, options.inputs // 10)):
        value = json.loads(reply(rng.choice(["Yes", "No", '{"score": 2, "reason": "x"}'])))
        for _ in range(rng.randint(1, 3)):
            value = mutate_json(rng, value)
        data = json.dumps(value).encode()
        mutated[f"mutated-{number}"] = mutate_bytes(rng, data, 3) if rng.random() < 0.3 else data
    behaviours = BEHAVIOURS | {name: send(data) for name, data in mutated.items()}
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = listener.getsockname()[1]
    server = children.start(lambda: _serve(listener, behaviours), out / "server.log")
    faults: Counter[str] = Counter()

    def ask_all(names: list[str]) -> None:
        for name in names:
            for wrong in _ask(port, name):
                print(json.dumps([name, wrong]), flush=True)

    try:
        groups = {name: [name] for name in BEHAVIOURS} | {"mutated": list(mutated)}
        works = {name: partial(ask_all, names) for name, names in groups.items()}
        for group, ended in children.run_beside(works, out, jobs=4, limit=2 * FOREVER + 5 * len(mutated)):
            if ended.code != 0:
                faults[f"{group}: exit code {ended.code}: {ended.last_words}"] += 1
            for line in ended.output.splitlines():
                if line.startswith("["):
                    _, wrong = json.loads(line)
                    faults[f"{group}: {wrong}"] += 1
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    for fault, times in faults.items():
        print(f"{fault}{f' ({times} times)' if times > 1 else ''}")
    print(f"{len(behaviours)} answers of servers, {faults.total()} faults")
    return not faults
