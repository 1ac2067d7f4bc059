"""Nothing leaves the machine with ``network: off``: sockets are refused in the whole process, and images stay out of
what a run writes. The guard cannot be removed again, so each test installs it in a separate process.

Run: pytest tests/core/test_network.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.config import ConfigError
from medvqa_rl.config.yaml import build_config
from medvqa_rl.core import embedded, network, progress
from medvqa_rl.core.network import (
    VARIABLE,
    is_loopback,
    is_on_this_machine,
    joining,
    spare_this_machine,
    unusable_proxy,
)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("[::1]", True),
        ("::1%lo", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("judge.localhost", True),
        ("::ffff:127.9.9.9", True),
        ("0.0.0.0", True),
        ("::", True),
        ("::ffff:192.0.2.1", False),
        ("192.0.2.1", False),
        ("10.0.0.1", False),
        ("fe80::1", False),
        ("2001:db8::1", False),
        ("example.com", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("128.0.0.1", False),
        ("", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_urls_of_this_machine() -> None:
    here = [
        "http://localhost:8000/v1",
        "https://user:key@127.9.8.7/",
        "http://[::1]:80",
        "http://[::ffff:127.0.0.1]/v1",
    ]
    assert all(map(is_on_this_machine, here))
    assert not any(
        map(is_on_this_machine, ["http://localhost@example.com/", "http://example.com:80/localhost", "", "x"])
    )


def test_clients_of_other_packages_reach_this_machine_without_the_proxy(
    proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's client (a mirror on localhost), urllib as in a user's reward function; other hosts keep the proxy."""
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    monkeypatch.delenv("no_proxy")
    server = type(proxy)()
    openai = pytest.importorskip("openai")

    def through_proxy(host: str) -> int:
        """How many of two requests the proxy gets; it and the server answer all with 502."""
        url, before = f"http://{host}:{server.http.server_port}/", len(proxy.seen)
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url, timeout=5)
        with openai.DefaultHttpxClient() as client:
            assert client.get(url).status_code == 502
        return len(proxy.seen) - before

    assert through_proxy("localhost") == 2, "the function is needed"
    spare_this_machine()
    spare_this_machine()
    assert [through_proxy(host) for host in ("localhost", "127.0.0.1", "remote.example")] == [0, 0, 2]
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"]
    assert os.environ["NO_PROXY"] == "intranet.example,localhost,.localhost,127.0.0.0/8,127.0.0.1,0.0.0.0,::1"
    server.http.shutdown()
    server.http.server_close()


def test_telemetry_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    for name in ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    spare_this_machine()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "True"
    assert os.environ["NO_PROXY"] == "*"


def test_a_hub_download_without_a_usable_proxy_takes_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert unusable_proxy() == "all_proxy (socks5)"
    with pytest.raises(ValueError, match=r"owner/name is not on this machine, and the proxy .*all_proxy \(socks5\)"):
        embedded.snapshot("owner/name", ["*.json"])
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--name" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert embedded.snapshot("owner/name", ["*.json"], revision=commit) == folder


SOCKETS = """
import asyncio, contextlib, http.client, json, os, socket, sys, tempfile, threading, urllib.request
from medvqa_rl.core.network import NetworkRefused, forbid_network, is_off

def name(call):
    try:
        call()
    except NetworkRefused as error:
        return "refused" if "because the network is off" in str(error) else str(error)
    except urllib.error.URLError as error:
        return "refused" if isinstance(error.reason, NetworkRefused) else repr(error)
    except Exception as error:
        return repr(error)
    return "done"

assert not is_off()
far, near = ("192.0.2.1", 9), socket.create_server(("127.0.0.1", 0))
port = near.getsockname()[1]
os.environ.update({key: f"http://127.0.0.1:{port}" for key in ("http_proxy", "HTTPS_PROXY", "all_proxy", "FTP_PROXY")})
forbid_network()
forbid_network()

def serve():
    while True:
        connection, _ = near.accept()
        with connection, contextlib.suppress(OSError):  # a client that has read enough hangs up
            connection.settimeout(1)
            connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nhello")
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):  # closing on unread bytes would reset
                pass

threading.Thread(target=serve, daemon=True).start()
udp, tcp = (socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM))
six = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
path = os.path.join(tempfile.mkdtemp(), "unix")
files = socket.socket(socket.AF_UNIX)
files.bind(path)
files.listen()
outside = {
    "create_connection": lambda: socket.create_connection(far, timeout=2),
    "connect": lambda: tcp.connect(far),
    "connect a name": lambda: tcp.connect(("example.com", 80)),
    "connect_ex": lambda: tcp.connect_ex(far),
    "connect 6": lambda: six.connect(("2001:db8::1", 80)),
    "sendto": lambda: udp.sendto(b"x", far),
    "sendto with flags": lambda: udp.sendto(b"x", 0, far),
    "sendmsg": lambda: udp.sendmsg([b"x"], [], 0, far),
    "below": lambda: super(socket.socket, tcp).connect(far),
    "getaddrinfo": lambda: socket.getaddrinfo("example.com", 443),
    "gethostbyname": lambda: socket.gethostbyname("example.com"),
    "gethostbyaddr": lambda: socket.gethostbyaddr("192.0.2.1"),
    "urlopen": lambda: urllib.request.urlopen("http://example.com/", timeout=2),
    "http.client": lambda: http.client.HTTPSConnection("192.0.2.1", timeout=2).request("GET", "/"),
    "asyncio": lambda: asyncio.run(asyncio.open_connection("192.0.2.1", 80)),
}
inside = {
    "loopback": lambda: socket.create_connection(("127.0.0.1", port), timeout=5).recv(5),
    "localhost": lambda: socket.create_connection(("localhost", port), timeout=5).recv(5),
    "urlopen": lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read(),
    "unix": lambda: socket.socket(socket.AF_UNIX).connect(path),
    "udp": lambda: udp.sendto(b"x", ("127.0.0.1", 9)),
    "listening": lambda: socket.create_server(("", 0)),
}
print(json.dumps({
    "outside": {key: name(call) for key, call in outside.items()},
    "inside": {key: name(call) for key, call in inside.items()},
    "offline": [os.environ.get(key) for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "MEDVQA_RL_NETWORK")],
    "proxies": urllib.request.getproxies(),
}))
"""


def python(code: str, folder: Path) -> Any:
    """The last line that a process prints, as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_outgoing_connection_is_refused_and_loopback_works(tmp_path: Path) -> None:
    found = python(SOCKETS, tmp_path)
    assert found["outside"] == dict.fromkeys(found["outside"], "refused")
    assert found["inside"] == dict.fromkeys(found["inside"], "done")
    assert found["offline"] == ["1", "1", "off"]
    assert found["proxies"] == {"no": "*"}, "the server on this machine would be asked for example.com"


RUN = """
import json, socket, sys, urllib.request
from pathlib import Path
from typer.testing import CliRunner
from medvqa_rl.cli.app import app
from medvqa_rl.core.network import NetworkRefused

Path("phone.py").write_text('''
import urllib.request
from medvqa_rl.core.network import NetworkRefused

calls = []

def home(prompts, completions, completion_ids, **kwargs):
    try:
        urllib.request.urlopen("http://192.0.2.1/", timeout=2)
    except urllib.error.URLError as error:
        calls.append(type(error.reason).__name__)
    return [0.0] * len(completions)
''')
sys.path.insert(0, ".")
codes, said = [], ""
for arguments in json.loads('''ARGUMENTS'''):
    result = CliRunner().invoke(app, arguments)
    codes.append(result.exit_code)
    said += result.output
import phone
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
    after = "connected"
except NetworkRefused as error:
    after = str(error)
print(json.dumps({"codes": codes, "calls": phone.calls, "after": after, "said": said}))
"""
CONFIG = """
output_dir: run
network: off
model: {path: "phantom:instruct", device: cpu}
data: {num_val: 4, num_test: 4}
rollout: {num_generations: 2, max_completion_length: 24}
rewards: {functions: {phone.home: 1.0}}
train: {steps: 1, prompts_per_step: 2, eval_steps: 1, log_completions_steps: 1, self_check: false, TRACKERS}
eval: {bootstrap: 20}
"""


def test_a_whole_run_evaluation_and_report_stay_on_this_machine_and_hold_no_image(tmp_path: Path) -> None:
    """A reward that opens a connection is refused during training, and the run folder contains no image."""
    pytest.importorskip("tensorboard")
    (tmp_path / "config.yaml").write_text(
        CONFIG.replace("TRACKERS", "trackers: [tensorboard], tracker_samples: texts")
    )
    verbs = [
        ["train", "config.yaml"],
        ["eval", "run", "--prompts", "think_answer,short,describe_think"],
        ["report", "run", "--no-images", "--output", "run/report.html"],
    ]
    found = python(RUN.replace("ARGUMENTS", json.dumps(verbs)), tmp_path)
    assert found["codes"] == [0, 0, 0], found["said"]
    assert found["calls"] == ["NetworkRefused"]
    assert found["after"].startswith("A connection to 192.0.2.1 was refused because the network is off")
    run = tmp_path / "run"
    assert len(list(run.glob("eval/prompts-*.csv"))) == 1
    assert "was written without images" in (run / "report.html").read_text()
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert {"metrics.jsonl", "train.log", "report.html"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        for mark in (b"\x89PNG\r\n", b"\xff\xd8\xff\xe0", b"data:image"):
            assert mark not in content, f"{path} holds an image"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"judge": {"endpoint": "https://api.example.com/v1", "model": "m"}},
            "judge.endpoint is on api.example.com, but network is off, so nothing may leave this machine: serve the "
            "judge here (http://localhost:8000/v1), or set network=on.",
        ),
        (
            {"eval_judge": {"endpoint": "http://192.0.2.7:8000/v1", "model": "m"}},
            "eval_judge.endpoint is on 192.0.2.7, but network is off, so nothing may leave this machine: serve the "
            "judge here (http://localhost:8000/v1), or set network=on.",
        ),
        (
            {"train": {"tracker_online": True}},
            "train.tracker_online is true, but network is off, so nothing may leave this machine: set "
            "train.tracker_online=false, or network=on.",
        ),
    ],
)
def test_settings_that_need_the_network_are_refused_at_the_start(given: dict[str, Any], sentence: str) -> None:
    build_config(given)
    with pytest.raises(ConfigError) as error:
        build_config({"network": "off", **given})
    assert error.value.problems == (sentence,)


def test_a_judge_on_this_machine_is_allowed() -> None:
    for endpoint in ("http://localhost:8000/v1", "http://127.0.0.1:8000/v1"):
        config = build_config({"network": "off", "judge": {"endpoint": endpoint, "model": "m"}})
        assert (config.network, config.judge.endpoint) == ("off", endpoint)


def test_the_option_before_the_verb_holds_for_every_verb(tmp_path: Path) -> None:
    code = """
import json
from typer.testing import CliRunner
from medvqa_rl.cli.app import app
from medvqa_rl.core.network import is_off
assert not is_off()
result = CliRunner().invoke(app, ["--network", "off", "config", "check", "none.yaml"])
print(json.dumps([result.exit_code, is_off()]))
"""
    assert python(code, tmp_path) == [2, True]


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_launch_whose_port_is_in_use_is_one_sentence(verb: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = ["--output", str(tmp_path / "run")] if verb == "eval" else [f"output_dir={tmp_path / 'run'}"]
        process = subprocess.run(
            [sys.executable, "-m", "medvqa_rl", verb, "configs/phantom_cpu.yaml", *output],
            env=os.environ | launch,
            capture_output=True,
            text=True,
            check=False,
        )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == (
        f"error: MASTER_PORT is {port}, but this port is in use, so the 2 processes of this launch cannot find each "
        "other: set MASTER_PORT to a free port for all of them, or let --gpus choose one."
    )
    assert not (tmp_path / "run").exists()


def test_a_rank_that_waits_long_for_the_others_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    with joining():
        time.sleep(0.1)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(network, "PATIENCE", 0.02)
    with joining():
        time.sleep(0.2)
    assert capfd.readouterr().err.splitlines()[0] == (
        "Rank 1 of 2 still waits for the others at node0:29500: check that all of them were started, with the same "
        "MASTER_ADDR and MASTER_PORT."
    )
