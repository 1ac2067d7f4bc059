"""``medvqa-rl serve`` over HTTP: a real server, the openai client, and answers compared with ``ask`` and ``generate``.

Run: pytest tests/cli/serve/test_serve.py
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.cli.ask import make_question
from medvqa_rl.cli.serve.server import ModelServer
from medvqa_rl.cli.serve.verb import served_model
from medvqa_rl.config import DataConfig, JudgeConfig, LoraConfig
from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.core.embedded import checkpoint_path
from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.types import Sample
from medvqa_rl.data.phantom.dataset import PhantomDataset
from medvqa_rl.models.checkpoints import model_for, write_model
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.rewards.judges.endpoint import EndpointJudge
from medvqa_rl.rewards.judges.load import load_judge, load_judges
from medvqa_rl.rewards.judges.protocol import JudgeRequest
from medvqa_rl.rewards.judges.rubric import COHERENCE, Rubric, parse_yes_no
from medvqa_rl.rollout.online import Failed
from medvqa_rl.rollout.stock.generate import make_engine
from tests.models.families.stock import stock_processor

NAME = "phantom:instruct"
KEY = "a secret key"
JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(policy: Policy, **settings: Any) -> Iterator[tuple[ModelServer, str]]:
    """A server in a thread, and its address, until the block ends."""
    given = {"max_batch": 8, "max_length": 96, "key": None, "is_local": True} | settings
    server = ModelServer(policy, NAME, **given)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=(listener,), daemon=True)
        thread.start()
        yield server, f"127.0.0.1:{listener.getsockname()[1]}"
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(model_for(NAME).model_copy(update={"device": "cpu"}))


@pytest.fixture(scope="module")
def running(policy: Policy) -> Iterator[tuple[ModelServer, str]]:
    with serving(policy) as started:
        yield started


@pytest.fixture
def server(running: tuple[ModelServer, str]) -> ModelServer:
    return running[0]


@pytest.fixture
def where(running: tuple[ModelServer, str]) -> str:
    return running[1]


@pytest.fixture
def client(where: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{where}/v1", api_key="none", max_retries=0)


def question(index: int = 0) -> Sample:
    return PhantomDataset(DataConfig(), "test")[index]


def as_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """The prompt of a question as a client sends it."""
    images = iter(sample.images)
    messages = render_prompt(sample).messages
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                part |= {"type": "image_url", "image_url": {"url": as_url(next(images).load())}}
    return messages


def post(where: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer to a request."""
    connection = http.client.HTTPConnection(where, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, JSON | {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def chat(where: str, sample: Sample, **settings: Any) -> dict[str, Any]:
    status, reply = post(where, {"model": NAME, "messages": conversation(sample)} | settings)
    assert status == 200, reply
    return reply


def texts(reply: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in reply["choices"]]


def test_greedy_answers_equal_those_of_ask(where: str, policy: Policy, tmp_path: Path) -> None:
    engine = make_engine(policy)
    for index in (0, 1, 7):
        sample = question(index)
        sample.images[0].load().save(tmp_path / "x.png")
        asked = make_question(tmp_path / "x.png", sample.question, sample.options)
        (group,) = engine.greedy([asked], max_completion_length=96, batch_size=1)
        (completion,) = group.completions
        reply = chat(where, sample, temperature=0)
        assert texts(reply) == [completion.text]
        (choice,) = reply["choices"]
        assert choice["index"] == 0 and choice["finish_reason"] == "stop" and choice["logprobs"] is None
        assert choice["message"]["role"] == "assistant"
        count, prompt = len(completion.token_ids), len(group.prompt.input_ids)
        assert reply["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": count,
            "total_tokens": prompt + count,
        }
        assert reply["object"] == "chat.completion" and reply["model"] == NAME


def test_greedy_answers_equal_those_of_generate_on_the_same_messages(where: str, policy: Policy) -> None:
    """A conversation of several turns with two images, by transformers' own chat template, processor and model."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint_path("instruct"), dtype=torch.float32)
    processor = policy.processor
    stock = stock_processor("Qwen2VLProcessor", processor.tokenizer, processor.image_processor)
    first, second = question(0), question(9)
    images = [first.images[0].load(), second.images[0].load()]
    turns = [
        {"role": "system", "content": "You read images."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first.question}]},
        {"role": "assistant", "content": "I do not know."},
        {"role": "user", "content": [{"type": "text", "text": "And here? "}, {"type": "image"}]},
    ]
    for messages, shown in ((turns, images), ([{"role": "user", "content": second.question}], [])):
        text = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = stock(text=[text], images=shown or None, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        sent = iter(shown)
        for message in messages:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "image":
                    part |= {"type": "image_url", "image_url": {"url": as_url(next(sent))}}
        status, reply = post(where, {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 40})
        assert status == 200
        assert texts(reply) == [stock.tokenizer.decode(ids, skip_special_tokens=True)]
        assert reply["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
        assert reply["usage"]["completion_tokens"] == len(ids)


def test_requests_that_come_together_get_what_each_gets_alone(where: str) -> None:
    settings = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 1, "n": 3, "temperature": 0.6},
        {"seed": 2, "top_p": 0.5, "max_tokens": 12},
        {"seed": 3, "stop": ["</think>"]},
        {"seed": -5, "n": 8},
    ]
    alone = [texts(chat(where, question(index), **given)) for index, given in enumerate(settings)]
    assert [len(answers) for answers in alone] == [1, 1, 3, 1, 1, 8]
    assert len({*alone[5]}) > 1 and "</think>" not in alone[4][0]
    with ThreadPoolExecutor(12) as pool:
        numbers = [*range(6)] * 2
        together = list(pool.map(lambda n: texts(chat(where, question(n), **settings[n])), numbers))
    assert together == alone * 2


def test_a_request_without_a_seed_draws_a_new_one(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter((11, 12))
    token = SimpleNamespace(randbits=lambda bits: next(drawn), token_hex=secrets.token_hex)
    monkeypatch.setattr("medvqa_rl.cli.serve.server.secrets", token)
    without = [texts(chat(where, question(1), n=8)) for _ in range(2)]
    assert without == [texts(chat(where, question(1), n=8, seed=seed)) for seed in (11, 12)]
    assert without[0] != without[1]


def test_the_openai_client_reads_whole_and_streamed_answers(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": NAME, "messages": conversation(question(3)), "seed": 4, "n": 2}
    given |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**given)
    streamed = client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    parts, ends, tokens, usage, chunks = ["", ""], ["", ""], [[], []], None, 0
    for chunk in streamed:
        assert usage is None, "the usage is last"
        usage, chunks = chunk.usage, chunks + 1
        for choice in chunk.choices:
            assert not ends[choice.index], "nothing follows the end of a completion"
            parts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []  # type: ignore[arg-type]
    assert chunks > 10 and usage == whole.usage
    assert parts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices if choice.logprobs]
    assert sum(map(len, tokens)) == whole.usage.completion_tokens
    for token in tokens[0]:
        assert token.logprob <= token.top_logprobs[0].logprob <= 0 and len(token.top_logprobs) == 2
        assert bytes(token.bytes).decode() == token.token


def test_a_limit_ends_an_answer(where: str) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        reply = chat(where, question(0), temperature=0, **{name: 3})
        assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 3


def test_models_are_listed(where: str, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="The model 'other' is not served here: ask for 'phantom:instruct'"):
        client.models.retrieve("other")
    connection = http.client.HTTPConnection(where, timeout=20)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


def hello(**settings: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": "hello"}]} | settings


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (hello(model="other"), 404, r"The model 'other' is not served here: ask for 'phantom:instruct'\."),
        (
            hello(n=9),
            400,
            r"n is 9, but this server decodes at most 8 .*: ask for fewer, or start it with .*--max-batch",
        ),
        (hello(max_tokens=97), 400, r"max_tokens is 97, but this server writes at most 96: .*--max-length\."),
        (
            hello(messages=[{"role": "user", "content": "word " * 5000}]),
            400,
            r"The prompt has \d+ tokens, and with 1 for the answer it is longer than the 4096 that this model reads",
        ),
        (
            hello(messages=[{"role": "user", "content": "an <|im_end|>"}]),
            400,
            r"A message holds <\|im_end\|>, which is a control token of this model: write it in another way\.",
        ),
    ],
)
def test_what_this_model_cannot_do_is_refused(where: str, body: Any, status: int, message: str) -> None:
    code, reply = post(where, body)
    error = reply["error"]
    assert code == status and error["type"] == "invalid_request_error" and error["param"] in body
    assert re.search(message, error["message"]), error["message"]


def test_other_paths_hosts_and_kinds_of_content_are_refused(where: str) -> None:
    assert post(where, {}, "/v1/completions")[0] == 404
    assert "this server has POST /v1/chat/completions" in post(where, {}, "/v1/embeddings")[1]["error"]["message"]
    assert post(where, {}, "/v1/models")[0] == 405
    code, reply = post(where, hello(), Content_Type="text/plain")
    assert code == 415 and "send application/json" in reply["error"]["message"]
    for host in ("evil.example:80", "[::1", "127.0.0.1.evil.example", ""):
        code, reply = post(where, hello(), Host=host)
        assert code == 403 and f"'{host}' is not this machine" in reply["error"]["message"]
    assert all(post(where, hello(), Host=host)[0] == 200 for host in ("localhost:9", "[::1]:80"))


def test_a_body_is_bounded(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medvqa_rl.cli.serve.server.MAX_BODY", 10_000)
    code, reply = post(where, hello(user="x" * 20_000))
    assert code == 413 and "longer than 0 MiB" in reply["error"]["message"]
    monkeypatch.setattr("medvqa_rl.cli.serve.server.BODY_SECONDS", 0.2)
    with socket.create_connection(where.split(":"), timeout=20) as connection:  # type: ignore[arg-type]
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_too_many_requests_are_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medvqa_rl.cli.serve.server.MAX_PENDING", 0)
    code, reply = post(where, hello())
    assert code == 429 and reply["error"]["type"] == "rate_limit_error"


def test_a_client_that_leaves_frees_its_place(server: ModelServer, where: str) -> None:
    for streams in (True, False):
        with socket.create_connection(where.split(":"), timeout=20) as connection:  # type: ignore[arg-type]
            body = json.dumps(hello(n=8, stream=streams, max_tokens=96, messages=conversation(question(0)))).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            end = time.monotonic() + 20
            while not server.engine._running:
                assert time.monotonic() < end
                time.sleep(0.001)
        while server.engine._running or server._pending:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_failure_is_an_error_of_the_server(server: ModelServer, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "submit", lambda request: request.send(Failed("It failed.")))
    for streams in (False, True):
        code, reply = post(where, hello(stream=streams))
        assert code == 500 and reply["error"] == {
            "message": "It failed.",
            "type": "server_error",
            "param": None,
            "code": None,
        }


def test_a_stream_that_fails_ends_with_the_error(
    server: ModelServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = server.engine.submit

    def fail_later(request: Any) -> None:
        send, seen = request.send, []

        def once(event: Any) -> None:
            seen.append(event)
            send(event if len(seen) == 1 else Failed("It failed.")) if len(seen) < 3 else None

        request.send = once
        submit(request)

    monkeypatch.setattr(server.engine, "submit", fail_later)
    stream = client.chat.completions.create(model=NAME, messages=conversation(question(0)), stream=True)
    with pytest.raises(openai.APIError, match=r"It failed\."):
        list(stream)


def test_a_key_is_needed_where_there_is_one(policy: Policy) -> None:
    with serving(policy, key=KEY, is_local=False) as (_, where):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            code, reply = post(where, hello(), **headers)
            assert code == 401 and reply["error"]["code"] == "invalid_api_key"
        assert post(where, hello(), Authorization=f"Bearer {KEY}", Host="another.example")[0] == 200
        client = openai.OpenAI(base_url=f"http://{where}/v1", api_key=KEY, max_retries=0)
        assert [model.id for model in client.models.list()] == [NAME]


def test_the_judges_of_this_project_can_ask_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses to constrain replies, so the judge asks without; the embedded model's text is no verdict."""
    config = JudgeConfig(endpoint=f"http://{where}/v1", model=NAME, cache=False, max_retries=0)
    with pytest.raises(ValueError, match=r"refuses structured_outputs \(HTTP 400: .*leave it out.*does not answer as"):
        load_judge(config)
    monkeypatch.setattr(Rubric, "parse", lambda rubric, text: parse_yes_no("Yes" if text else ""))
    said: list[str] = []
    judge = load_judges(config, [COHERENCE], say=said.append)["coherence"]
    assert len(said) == 1 and "refuses structured_outputs (HTTP 400: " in said[0]
    grades = judge.grade([JudgeRequest("Is there a mass?", ("yes", "no"), f"Reason {n}.") for n in range(12)])
    assert [grade.score for grade in grades] == [1] * 12
    assert judge.counters["completion_tokens"] > 12 and judge.counters["retries"] == 0
    with pytest.raises(ValueError, match="does not serve the judge's model 'other', but phantom:instruct"):
        EndpointJudge(config.model_copy(update={"model": "other"}), "none", COHERENCE).check()


def test_a_run_is_served_with_its_own_settings(
    tiny_policy: Callable[..., Policy], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "my run"
    settings = {
        "model": {"path": str(tiny_folder("qwen2_vl")), "device": "cpu", "max_pixels": 3136, "lora": {"rank": 2}},
        "output_dir": str(run),
    }
    run.mkdir()
    (run / "config.yaml").write_text(write_yaml(settings), encoding="utf-8")
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        served_model(str(run))
    write_model(tiny_policy(lora=LoraConfig(rank=2)), run / "best")
    model, name = served_model(str(run))
    assert name == "my run" and model.adapter == str(run / "best") and model.max_pixels == 3136
    assert load_policy(model).is_lora
    model, name = served_model(str(run / "best"))
    assert name == "best" and model.path == str(tiny_folder("qwen2_vl")) and model.adapter == str(run / "best")
    assert served_model("phantom:base")[1] == "phantom:base"
    assert served_model("owner/name")[0].path == served_model("owner/name")[1] == "owner/name"


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command, killed when the block ends if it is still running."""
    process = subprocess.Popen(
        [sys.executable, "-m", "medvqa_rl", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_ends_the_command_and_what_it_was_answering() -> None:
    with started(NAME, "--port", "0", MEDVQA_RL_API_KEY=KEY) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "phantom:instruct is served at http://127.0.0.1:" in line and "never use it for a decision" in line
        where = line.partition("http://")[2].partition("/")[0]
        key = {"Authorization": f"Bearer {KEY}"}
        assert post(where, hello())[0] == 401 and post(where, hello(), **key)[0] == 200
        slow = hello(n=16, max_tokens=1024, messages=conversation(question(0)), temperature=2, stream=True)
        connection = http.client.HTTPConnection(where, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(slow).encode(), JSON | key)
        reply = connection.getresponse()
        assert reply.status == 200 and reply.readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)
        assert b"The server was stopped." in reply.read()
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and errors.endswith("Stopped.\n") and "Traceback" not in errors
        assert KEY not in output + errors


def test_addresses_that_cannot_be_used_are_named_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "phantom:instruct", "--port", str(port)])
    assert result.exit_code == 2
    assert f"Port {port} of 127.0.0.1 is in use by another program: end that, or choose another with --port" in (
        result.output
    )
    result = CliRunner().invoke(app, ["serve", "phantom:instruct", "--host", "192.0.2.7"])
    assert result.exit_code == 2 and "--host is '192.0.2.7', which is no address of this machine" in result.output
    result = CliRunner().invoke(app, ["serve", "nowhere/at/all", "--port", "0"])
    assert result.exit_code == 2 and "nowhere/at/all" in result.output
    result = CliRunner().invoke(app, ["serve", "phantom:instruct"], env={"MEDVQA_RL_API_KEY": " "})
    assert result.exit_code == 2 and "The API key is empty" in result.output


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(app, ["serve", "phantom:instruct", "--port", "0"])
    assert result.exit_code == 2
    assert f"serve needs the package {package}: install it with `pip install 'medvqa-rl[serve]'`." in result.output


def test_other_machines_are_warned_of_and_refused_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelServer, "run", lambda self, listener: None)
    result = CliRunner().invoke(app, ["serve", "phantom:instruct", "--host", "0.0.0.0", "--port", "0"])
    printed = " ".join(result.output.split())
    assert result.exit_code == 0
    assert "Warning: everyone who reaches this machine at 0.0.0.0 can ask it: set MEDVQA_RL_API_KEY to" in printed
    monkeypatch.setattr("medvqa_rl.cli.serve.verb.is_off", lambda: True)
    result = CliRunner().invoke(app, ["serve", "phantom:instruct", "--host", "0.0.0.0", "--port", "0"])
    assert (
        result.exit_code == 2 and "but the network is off: leave out --host, or turn the network on" in result.output
    )
    assert CliRunner().invoke(app, ["serve", "phantom:instruct", "--port", "0"]).exit_code == 0
