"""A judge behind an endpoint: a real local server that misbehaves on purpose.

Run: pytest tests/rewards/judges/test_endpoint.py
"""

from __future__ import annotations

import io
import json
import math
import socket
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medvqa_rl.config import JudgeConfig
from medvqa_rl.core.network import read_key
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.rewards.judges.endpoint import (
    MAX_WAIT,
    EndpointJudge,
    host_of,
    wait_before,
)
from medvqa_rl.rewards.judges.load import load_judge, load_judges
from medvqa_rl.rewards.judges.prompts import ENDPOINT
from medvqa_rl.rewards.judges.protocol import JudgeRequest, SeenImage
from medvqa_rl.rewards.judges.rubric import COHERENCE, REASONING, parse_json, parse_yes_no, seeing

REQUEST = JudgeRequest("Is there a mass?", ("yes", "no"), "No mass is seen.")
Reply = tuple[int, dict[str, str], bytes, float]


def reply(text: Any, **message: Any) -> Reply:
    """A sound chat completion with 7 prompt tokens and 1 completion token."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode(), 0.0


def status(code: int, **headers: str) -> Reply:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return code, {"Content-Type": "application/json", **names}, b'{"error": {"message": "as asked"}}', 0.0


def raw(body: bytes, kind: str = "application/json") -> Reply:
    return 200, {"Content-Type": kind}, body, 0.0


def slow(seconds: float) -> Reply:
    code, headers, body, _ = reply("Yes")
    return code, headers, body, seconds


class Server:
    """Answers with the replies in turn, the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [reply("Yes")]
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.now = self.most = 0
        self.models = ["m"]
        self.answer: Callable[[dict[str, Any]], Reply] | None = None
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.seen.append({"path": self.path, **body})
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.now += 1
                    server.most = max(server.most, server.now)
                    turn = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
                if server.answer is not None:
                    turn = server.answer(body)
                code, headers, content, delay = turn
                time.sleep(delay)
                with lock:
                    server.now -= 1
                try:
                    self.send_response(code)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client did not wait

            def do_GET(self) -> None:
                listed = [{"id": name, "object": "model"} for name in server.models]
                content = json.dumps({"object": "list", "data": listed}).encode()
                self.send_response(200 if self.path == "/v1/models" else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def judge_at(url: str, waits: list[float] | None = None, **settings: Any) -> EndpointJudge:
    config = JudgeConfig(endpoint=url, model="m", **({"max_retries": 2, "timeout": 5.0} | settings))
    key, sleep = read_key(config.api_key_env), (waits if waits is not None else []).append
    return EndpointJudge(config, key, COHERENCE, sleep=sleep)


def test_a_request_has_the_documented_content_and_is_counted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "not-to-be-sent")
    server.replies = [reply("Yes"), reply(" no.\n")]
    judge = judge_at(server.url, concurrency=1)
    assert [verdict.score for verdict in judge.grade([REQUEST, REQUEST])] == [1.0, 0.0]
    asked = server.seen[0]
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "m" and asked["temperature"] == 0
    content = asked["messages"][0]["content"]
    assert "Question: Is there a mass?\nOptions: A: yes; B: no\nReasoning: No mass is seen." in content
    assert "not-to-be-sent" not in str(server.headers)
    expected = {"asked": 2, "failed": 0, "requests": 2, "retries": 0, "prompt_tokens": 14, "completion_tokens": 2}
    assert judge.counters == expected
    assert judge.identity.fingerprint == f"{host_of(server.url)}/m"


@pytest.mark.parametrize(
    "trouble",
    [
        status(429, Retry_After="7"),
        status(500),
        status(503),
        raw(b"{not json"),
        raw(b"<html>busy</html>", "text/html"),
        raw(b"{}"),
        raw(b"[]"),
        raw(b'{"choices": []}'),
        raw(b'{"choices": [{"message": null}]}'),
        raw(b""),
    ],
    ids=["429", "500", "503", "not JSON", "HTML", "no fields", "a list", "no choices", "no message", "empty body"],
)
def test_transient_errors_are_retried(server: Server, trouble: Reply) -> None:
    waits: list[float] = []
    server.replies = [trouble, trouble, reply("Yes")]
    judge = judge_at(server.url, waits)
    assert judge.grade([REQUEST])[0].score == 1.0
    assert len(server.seen) == 3 and judge.counters["retries"] == 2
    assert waits == [7.0, 7.0] if trouble[0] == 429 else 0.5 <= waits[0] < 0.625 < 1.0 <= waits[1] < 1.25
    server.replies = [trouble]
    lasting = judge.grade([REQUEST])[0]
    assert math.isnan(lasting.score) and "(tried 3 times)" in lasting.reason
    assert len(server.seen) == 6 and judge.counters["failed"] == 1


def test_a_redirect_is_not_followed(server: Server) -> None:
    other = Server()
    server.replies = [status(307, Location=f"{other.url}/chat/completions")]
    verdict = judge_at(server.url).grade([REQUEST])[0]
    assert math.isnan(verdict.score) and verdict.reason
    assert len(server.seen) == 1 and not other.seen
    other.http.shutdown()
    other.http.server_close()


@pytest.mark.parametrize("code", [400, 401, 403, 404])
def test_a_refusal_is_not_retried(server: Server, code: int) -> None:
    server.replies = [status(code)]
    verdict = judge_at(server.url).grade([REQUEST])[0]
    assert math.isnan(verdict.score) and verdict.reason.startswith(f"HTTP {code}")
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "answer",
    [reply(""), reply(None), reply("I can't help with that."), reply("Yes, but"), reply(None, refusal="No.")],
    ids=["empty", "null", "refusal", "more than a word", "refusal field"],
)
def test_other_verdicts_than_yes_and_no_fail_and_are_not_retried(server: Server, answer: Reply) -> None:
    server.replies = [answer]
    judge = judge_at(server.url)
    verdict = judge.grade([REQUEST])[0]
    assert math.isnan(verdict.score) and "neither Yes nor No" in verdict.reason
    assert len(server.seen) == 1 and judge.counters["prompt_tokens"] == 7


def test_a_slow_server_times_out(server: Server) -> None:
    server.replies = [slow(3.0), reply("Yes")]
    began = time.perf_counter()
    assert judge_at(server.url, timeout=0.3).grade([REQUEST])[0].score == 1.0
    assert time.perf_counter() - began < 2.5
    server.replies = [slow(3.0)]
    verdict = judge_at(server.url, timeout=0.2, max_retries=0).grade([REQUEST])[0]
    assert verdict.reason == "no answer within 0.2 seconds"


def test_order_is_kept_and_concurrency_bounded(server: Server) -> None:
    requests = [JudgeRequest("Q?", (), f"Number {n} {'holds' if n % 3 else 'fails'}.") for n in range(24)]

    def answer(body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        code, headers, content, _ = reply("Yes" if "holds" in text else "No")
        return code, headers, content, 0.02

    server.answer = answer
    values = [verdict.score for verdict in judge_at(server.url, concurrency=3).grade(requests)]
    assert values == [float(bool(n % 3)) for n in range(24)]
    assert 2 <= server.most <= 3


def test_a_bad_response_affects_only_its_own_verdict(server: Server) -> None:
    server.answer = lambda body: status(400) if "bad" in str(body) else reply("Yes")
    verdicts = judge_at(server.url).grade([REQUEST, JudgeRequest("Q?", (), "bad"), REQUEST, JudgeRequest("", (), " ")])
    assert [verdict.score for verdict in verdicts] == pytest.approx([1, math.nan, 1, 0], nan_ok=True)
    assert len(server.seen) == 3, "empty reasoning is not sent"


def test_the_key_comes_from_the_environment_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ValueError, match=r"api_key_env is MY_KEY, but the environment has no such variable"):
        judge_at(server.url, api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret-7")
    judge = judge_at(server.url, api_key_env="MY_KEY")
    judge.grade([REQUEST])
    assert server.headers[0]["authorization"] == "Bearer secret-7"
    assert "secret-7" not in repr(judge.identity) + repr(judge._config)


def test_the_extra_is_named_where_the_client_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"package openai: install it with `pip install 'medvqa-rl\[judge\]'`"):
        judge_at("http://localhost:1/v1")


def test_an_unusable_endpoint_is_refused_when_loading(server: Server) -> None:
    server.replies = [status(401)]
    settings = {"model": "m", "max_retries": 0, "cache": False}
    with pytest.raises(ValueError, match=r"does not answer as it should \(HTTP 401.*check judge\.endpoint"):
        load_judge(JudgeConfig(endpoint=server.url, **settings))  # type: ignore[arg-type]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match="no connection"):
        load_judge(JudgeConfig(endpoint=f"http://127.0.0.1:{port}/v1", **settings))  # type: ignore[arg-type]
    server.replies = [reply("Certainly! Yes.")]
    with pytest.raises(ValueError, match="neither Yes nor No"):
        load_judge(JudgeConfig(endpoint=server.url, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["Yes", "yes", " YES.\n", "yes. ", "\tYes"])
def test_yes_in_any_case_with_space_and_a_full_stop(text: str) -> None:
    assert parse_yes_no(text).score == 1.0
    assert parse_yes_no(text.lower().replace("yes", "nO")).score == 0.0


@pytest.mark.parametrize("text", ["", None, "Yes!", "Yes..", "**Yes**", "Yes No", "No way", "y", "Not", "Y e s", "是"])
def test_everything_else_fails(text: str | None) -> None:
    assert not parse_yes_no(text).is_scored


@given(st.text(max_size=12))
def test_a_verdict_needs_exactly_the_word(text: str) -> None:
    value = parse_yes_no(text).score
    letters = "".join(character for character in text if not character.isspace()).removesuffix(".")
    assert math.isnan(value) or value == {"yes": 1.0, "no": 0.0}[letters.lower()]


def test_retry_delays() -> None:
    assert wait_before(1, "3") == 3.0 and wait_before(1, "0") == 0.0
    assert wait_before(1, "100000") == MAX_WAIT == wait_before(30, None)
    for header in (None, "Wed, 21 Oct 2026 07:28:00 GMT", "nan", "-1"):
        assert 2.0 <= wait_before(3, header) < 2.5


CASE = JudgeRequest("Which organ?", ("lung", "brain"), "Dark fields.", answer="B", gold="A: lung")


def test_an_endpoint_grades(server: Server) -> None:
    server.replies = [
        reply('{"score": 2, "reason": "A gap."}'),
        reply("Score: 2"),
        status(429, Retry_After="0"),
        reply('{"score": 3, "reason": "Sound."}'),
        status(400),
    ]
    config = JudgeConfig(endpoint=server.url, model="m", max_retries=1, concurrency=1, timeout=5.0)
    judge = EndpointJudge(config, "none", REASONING, sleep=lambda seconds: None)
    grades = judge.grade([CASE, CASE, replace(CASE, reasoning=" "), CASE, CASE])
    assert [grade.score for grade in grades] == pytest.approx([2, math.nan, 0, 3, math.nan], nan_ok=True)
    assert grades[0].reason == "A gap." and "not JSON" in grades[1].reason and grades[4].reason.startswith("HTTP 400")
    assert len(server.seen) == 5, "empty reasoning is not sent, and what cannot be read is not asked again"
    assert server.seen[0]["messages"] == [{"role": "user", "content": REASONING.render(CASE)}]
    assert server.seen[0]["temperature"] == 0
    assert judge.counters["asked"] == 5 and judge.counters["failed"] == 2 and judge.counters["retries"] == 1
    assert (judge.identity.name, judge.identity.fingerprint) == ("m", f"{server.url[7:-3]}/m")


CONSTRAINTS = ("structured_outputs", "response_format")


def is_constrained(body: dict[str, Any]) -> bool:
    return any(name in body for name in CONSTRAINTS)


def test_replies_are_constrained_to_what_is_read(server: Server) -> None:
    server.replies = [reply("Yes"), reply('{"score": 2, "reason": "A gap."}')]
    config = JudgeConfig(endpoint=server.url, model="m", cache=False)
    said: list[str] = []
    judges = load_judges(config, [COHERENCE, REASONING], say=said.append)
    assert not said, "a server that accepts the constraint is worth no word"
    assert server.seen[0]["structured_outputs"] == {"choice": ["Yes", "No"]}
    asked = server.seen[1]["response_format"]
    assert asked["type"] == "json_schema" and asked["json_schema"]["strict"]
    schema = asked["json_schema"]["schema"]
    assert schema["properties"]["score"] == {"type": "integer", "enum": [0, 1, 2, 3]}
    assert schema["required"] == ["score", "reason"] and schema["additionalProperties"] is False
    assert all(parse_yes_no(word).is_scored for word in server.seen[0]["structured_outputs"]["choice"])
    for score in schema["properties"]["score"]["enum"]:
        assert parse_json(json.dumps({"score": score, "reason": "x"})).score == score
    free = {"coherence": ENDPOINT.hash, "reasoning": REASONING.hash}
    hashes = {name: judge.identity.prompt_hash for name, judge in judges.items()}
    assert not set(hashes.values()) & set(free.values()), "constrained verdicts are cached apart from free ones"
    assert hashes == {"coherence": "c086724cc5cc51e4", "reasoning": "44a6cf180700f3f9"}, "cached verdicts are lost"


@pytest.mark.parametrize("code", [400, 422])
def test_a_server_that_refuses_constraints_is_asked_without_from_then_on(server: Server, code: int) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        good = reply('{"score": 3, "reason": "Sound."}' if "JSON" in str(body["messages"]) else "No")
        return status(code) if is_constrained(body) else good

    server.answer = answer
    said: list[str] = []
    config = JudgeConfig(endpoint=server.url, model="m", cache=False, max_retries=0)
    judges = load_judges(config, [COHERENCE, REASONING], say=said.append)
    assert [is_constrained(body) for body in server.seen] == [True, False, True, False]
    assert said == [
        f"Notice: the judge 'm' at {host_of(server.url)} refuses {name} (HTTP {code}: as asked), so its {rubric} "
        "verdicts are read from free text, and those that cannot be read are unscored."
        for name, rubric in zip(CONSTRAINTS, ("coherence", "reasoning"))
    ]
    assert [grade.score for grade in judges["coherence"].grade([REQUEST, REQUEST])] == [0, 0]
    assert [grade.score for grade in judges["reasoning"].grade([CASE])] == [3]
    assert not any(map(is_constrained, server.seen[4:])) and len(server.seen) == 7 and len(said) == 2
    identities = [judge.identity.prompt_hash for judge in judges.values()]
    assert identities == [ENDPOINT.hash, REASONING.hash], "as before replies were constrained"


def test_a_server_whose_free_text_cannot_be_read_either(server: Server) -> None:
    server.answer = lambda body: status(400) if is_constrained(body) else reply("Certainly!")
    config = JudgeConfig(endpoint=server.url, model="m", cache=False, max_retries=0)
    with pytest.raises(
        ValueError,
        match=r"^The judge 'm' at .* refuses structured_outputs \(HTTP 400.*\), and without it does not answer as it "
        r"should \(the answer is neither Yes nor No: 'Certainly!'\): serve it with vLLM.* follows instructions\.$",
    ):
        load_judge(config)
    assert len(server.seen) == 2


def test_later_refusals_do_not_loosen_the_constraint(server: Server) -> None:
    """Such as a prompt that is too long: verdicts of one judge are all asked in the same way."""
    server.replies = [reply("Yes"), status(400), reply("Yes")]
    judge = load_judge(JudgeConfig(endpoint=server.url, model="m", cache=False, concurrency=1))
    assert [grade.is_scored for grade in judge.grade([REQUEST, CASE])] == [False, True]
    assert all(map(is_constrained, server.seen)) and len(server.seen) == 3


@pytest.mark.parametrize("code", [400, 404])
def test_a_server_that_serves_another_model(server: Server, code: int) -> None:
    server.replies = [status(code)]
    server.models = ["first", "second\x1b[31m"]
    config = JudgeConfig(endpoint=server.url, model="m", cache=False)
    with pytest.raises(
        ValueError,
        match=r"^The server at \S+ does not serve the judge's model 'm', but first, second\\x1b\[31m: set judge\.model"
        r" to a name that it serves\.$",
    ):
        load_judge(config)
    server.models = ["m"]
    with pytest.raises(ValueError, match=rf"does not answer as it should \(HTTP {code}.*check judge\.endpoint"):
        load_judge(config)


def test_an_endpoint_that_does_not_grade_is_refused_when_loading(server: Server) -> None:
    server.replies = [reply("Yes"), reply("Yes")]
    config = JudgeConfig(endpoint=server.url, model="m", max_retries=0, cache=False)
    with pytest.raises(ValueError, match=r"does not answer as it should \(the answer is not JSON: 'Yes'\): check"):
        load_judges(config, [COHERENCE, REASONING])
    assert len(server.seen) == 2, "once for each rubric"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
def test_a_judge_on_this_machine_is_asked_without_the_proxy(server: Server, proxy: Any, host: str) -> None:
    judge = judge_at(server.url.replace("127.0.0.1", host), max_retries=0)
    assert judge.grade([REQUEST])[0].score == 1.0
    assert len(server.seen) == 1 and proxy.seen == []


def test_a_judge_elsewhere_is_asked_through_the_proxy(proxy: Any) -> None:
    (grade,) = judge_at("http://judge.example:8000/v1", max_retries=0).grade([REQUEST])
    assert grade.reason == "HTTP 502" and not grade.is_scored
    ((line, body),) = proxy.seen
    assert line.startswith("POST http://judge.example:8000/v1/chat/completions") and b"Is there a mass?" in body


@pytest.mark.parametrize("scheme", ["socks5", "socks", "ftp"])
def test_a_proxy_that_the_client_cannot_use(server: Server, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:9")
    assert judge_at(server.url).grade([REQUEST])[0].score == 1.0
    with pytest.raises(
        ValueError, match=rf"on judge\.example, but the proxy .* all_proxy \({scheme}\) cannot be used"
    ):
        judge_at("https://judge.example/v1")
    monkeypatch.setenv("NO_PROXY", "*")
    judge_at("https://judge.example/v1")


SEES = seeing(COHERENCE, "image")


def sighted(server: Server, **settings: Any) -> EndpointJudge:
    config = JudgeConfig(endpoint=server.url, model="m", sees="image", max_retries=0, timeout=5.0, **settings)
    return EndpointJudge(config, "none", SEES, sleep=lambda seconds: None)


def picture(*size: int) -> SeenImage:
    image = Image.effect_noise(size, 80.0).convert("RGB")  # type: ignore[arg-type]
    image.info["comment"] = "Jane Doe"
    return SeenImage(MemoryImage("scans/jane_doe.png", image))


def decoded(part: dict[str, Any]) -> Image.Image:
    kind, _, content = part["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(b64decode(content)))


def test_images_are_sent_as_content_parts_with_nothing_but_pixels(server: Server) -> None:
    one, large = picture(30, 20), picture(60, 40)
    judge = sighted(server, max_pixels=600)
    assert judge.grade([replace(REQUEST, images=(one, large))])[0].score == 1.0
    first, second, text = server.seen[0]["messages"][0]["content"]
    assert decoded(first).tobytes() == one.image.tobytes() and not decoded(first).info
    assert decoded(second).size == (30, 20)
    assert text == {"type": "text", "text": SEES.render(REQUEST)}
    assert "jane" not in str(server.seen).lower()
    assert judge.grade([REQUEST])[0].score == 1.0
    assert server.seen[1]["messages"][0]["content"] == SEES.render(REQUEST), "a question without images is text"


def test_a_server_that_cannot_see_is_refused_before_training(server: Server) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        return reply("Yes") if isinstance(body["messages"][0]["content"], str) else status(400)

    server.answer = answer
    config = JudgeConfig(endpoint=server.url, model="m", sees="image", cache=False, max_retries=0)
    with pytest.raises(ValueError, match=r"cannot see: it refuses an image \(HTTP 400: as asked\)") as caught:
        load_judges(config, [COHERENCE])
    assert "set judge.model to a vision-language model, or judge.sees" in str(caught.value)
    assert load_judges(config.model_copy(update={"sees": "text"}), [COHERENCE])


def test_what_is_seen_is_part_of_the_identity(server: Server) -> None:
    judges = [judge_at(server.url), sighted(server), sighted(server, max_pixels=500)]
    assert len({judge.identity.key for judge in judges}) == 3
