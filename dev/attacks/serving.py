"""Hostile clients of ``medvqa-rl serve``: each gets an answer or a refusal in bounded time and memory, and the next
client gets the answer that it got before."""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from .mutations import mutate_bytes, mutate_json

ALLOWED = 60.0
"""Seconds that a request may take on a busy machine."""
MEMORY = 3 * 2**29
"""Bytes by which the server may grow: some decoded images of 80 megapixels."""
ANSWERS = {200, 400, 401, 403, 404, 405, 408, 413, 415, 429}
MODEL = "phantom:instruct"


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sound(data: bytes, **fields: Any) -> dict[str, Any]:
    """A request about an image."""
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Is there a mass?"}]
    messages = [{"role": "user", "content": parts}]
    return {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0} | fields


PICTURE = encoded(Image.effect_noise((120, 90), 80).convert("RGB"))
FULL = {"n": 2, "seed": 3, "stop": ["x"], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}


def bodies(rng: random.Random, count: int) -> list[bytes]:
    """Damaged requests: their fields, their bytes, their images."""
    made = [b"", b"{" * 100_000, b"9" * 100_000, b'{"a":' * 20_000, encoded(Image.new("1", (12_000, 12_000)))]
    made.append(json.dumps(sound(encoded(Image.new("1", (8_900, 8_900))))).encode())
    made.append(json.dumps(sound(encoded(Image.new("1", (20_000, 1))))).encode())
    made.append(json.dumps(sound(PICTURE, messages=[{"role": "user", "content": "word " * 100_000}])).encode())
    for _ in range(count):
        value: Any = sound(PICTURE, **(FULL if rng.random() < 0.5 else {}))
        match rng.randrange(3):
            case 0:
                value = sound(mutate_bytes(rng, PICTURE))
            case 1:
                for _ in range(rng.randint(1, 3)):
                    value = mutate_json(rng, value)
        data = json.dumps(value).encode()
        made.append(mutate_bytes(rng, data) if rng.random() < 0.2 else data)
    return made


def ask(port: int, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ALLOWED)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    return reply.status, reply.read()


def fault(port: int, body: bytes) -> str:
    """What is wrong with the answer to a body; empty if nothing is."""
    try:
        status, text = ask(port, body)
        if status not in ANSWERS:
            return f"status {status}: {text[:200]!r}"
        if status != 200:
            message = json.loads(text)["error"]["message"]
            return "" if message.endswith(".") and len(message) < 3000 else f"says {message[:200]!r}"
        is_whole = text.endswith(b"data: [DONE]\n\n") or json.loads(text)["choices"]
        return "" if is_whole else f"answers {text[:100]!r}"
    except Exception as error:  # noqa: BLE001  (any error here is a fault)
        return f"{type(error).__name__}: {str(error)[:100]}"


def raw(rng: random.Random) -> Callable[[int], None]:
    """A connection that does not keep to HTTP, or that ends early."""
    body = json.dumps(sound(PICTURE, stream=True, max_tokens=200)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    data = (head + "Content-Type: application/json\r\n\r\n").encode() + body
    sent = data[: rng.randint(0, len(data))] if rng.random() < 0.4 else data
    sent = mutate_bytes(rng, sent[:400]) + sent[400:] if rng.random() < 0.5 else sent

    def act(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=ALLOWED) as connection:
            connection.sendall(sent)
            time.sleep(0.05)

    return act


def _wait(path: Path, process: subprocess.Popen[bytes]) -> int:
    """The port of a server that has started."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if "http://127.0.0.1:" in (text := path.read_text()):
            return int(text.partition("http://127.0.0.1:")[2].partition("/")[0])
        time.sleep(0.1)
    sys.exit(f"The server does not start: {path.read_text()[-1000:]}")


def main(options: argparse.Namespace) -> bool:
    """Send damaged requests and broken connections, several at a time; returns whether all held."""
    out = options.out / "serving"
    out.mkdir(parents=True, exist_ok=True)
    rng, faults = random.Random(options.seed), Counter[str]()
    command = [sys.executable, "-m", "medvqa_rl", "serve", MODEL, "--port", "0", "--max-length", "256"]
    with (out / "output.txt").open("wb") as output, (out / "errors.txt").open("wb") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        try:
            port = _wait(out / "output.txt", process)
            usual = json.dumps(sound(PICTURE, max_tokens=40)).encode()
            expected = json.loads(ask(port, usual)[1])["choices"]
            server = psutil.Process(process.pid)
            before = server.memory_info().rss
            sent = bodies(rng, max(50, options.inputs // 10))
            broken = [raw(rng) for _ in range(max(20, options.inputs // 50))]
            with ThreadPoolExecutor(6) as pool:
                ended = [pool.submit(act, port) for act in broken]
                faults.update(wrong for wrong in pool.map(lambda body: fault(port, body), sent) if wrong)
                faults.update(f"connection: {one.exception()}" for one in ended if one.exception() is not None)
            status, text = ask(port, usual)
            if status != 200 or json.loads(text)["choices"] != expected:
                faults[f"the usual request gets {status}: {text[:200]!r}"] += 1
            grown = server.memory_info().rss - before
            if grown > MEMORY:
                faults[f"the server grew by {grown / 2**30:.1f} GiB"] += 1
            process.send_signal(signal.SIGINT)
            if process.wait(30) != 130:
                faults[f"Ctrl-C ends it with {process.returncode}"] += 1
        finally:
            process.kill()
            process.wait()
    if "Traceback" in (text := (out / "errors.txt").read_text()):
        faults[f"a traceback: {text[-300:]}"] += 1
    for what, times in faults.items():
        print(f"{what}{f' ({times} times)' if times > 1 else ''}")
    print(f"{len(sent)} requests and {len(broken)} broken connections, {faults.total()} faults")
    return not faults
