"""The server of ``medvqa-rl view``: what it answers, to whom, and what it refuses.

Run: pytest tests/cli/view/test_server.py
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from PIL import Image
from synthetic import EVIL, completion_rows, make_run, write, write_eval, write_evaluation, write_lines
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.cli.view import guard
from medvqa_rl.config import Config, DataConfig, EvalConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.records import write_records
from medvqa_rl.evaluation.statistics.summary import summarise
from medvqa_rl.report.pages.answers import PAGE, Query, merge_answers, select, shown_evaluations
from medvqa_rl.report.pages.overview import render_overview
from medvqa_rl.report.runs import StoredRun, read_run
from tests.cli.view.conftest import TOKEN, Served, serve
from tests.records import make_record

HOME = "after_home (phantom/home/test)"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs and an evaluation outside of runs."""
    root = tmp_path_factory.mktemp("view") / "runs"
    first = make_run(root / "first")
    make_run(root / "study" / "grpo", steps=60, state="running")
    write_eval(root / "alone", [True, False])
    for name in ("before_home", "after_home"):
        write_evaluation(first / "eval", name, 24)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Served]:
    with serve(root) as served:
        yield served


def asked(server: Served, **given: str) -> Any:
    """What the browser of answers gets."""
    answer = server.send("answers?" + urlencode({"run": "first", "eval": HOME, **given}))
    assert answer.status == 200, answer.text
    return json.loads(answer.text)


def test_the_list_has_every_run_with_its_numbers(server: Served) -> None:
    page = server.send()
    assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    rows = [
        re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row)).strip()
        for row in re.findall(r"<tr>.*?</tr>", page.text, re.DOTALL)[1:]
    ]
    assert [re.sub(r"\d+ days ago", "AGE", row) for row in rows] == [
        "study/grpo train running, silent 60 of 60 50.0 → 70.0 40.0 to 90.0 AGE",
        "first train finished 40 of 40 50.0 → 70.0 40.0 to 90.0 before_home (phantom/home/test): 50.0 50.0 to 50.0 "
        f"{HOME}: 50.0 50.0 to 50.0 AGE",
        "alone evaluated alone (phantom/home/val): 50.0",
    ]
    assert 'href="runs?run=study%2Fgrpo"' in page.text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "now"),
        (119, "now"),
        (120, "2 min ago"),
        (7300, "2.0 h ago"),
        (172_000, "47.8 h ago"),
        (259_200, "3 days ago"),
    ],
)
def test_the_age_of_a_run(seconds: int, shown: str) -> None:
    now = datetime(2026, 1, 10, tzinfo=UTC)
    status = {"state": "finished", "updated": (now - timedelta(seconds=seconds)).isoformat()}
    page = render_overview([StoredRun(Path("one"), status=status)], [], folder="runs", now=now)
    assert f"<td>{shown}</td>" in page


def test_the_page_of_a_run_asks_for_its_samples(server: Served) -> None:
    page = server.send("runs?run=first").text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    found = json.loads(data)
    assert found["questions"] == [] and found["groups"] == [] and found["images"] == {}
    assert found["answersFrom"] == "answers?run=first" and found["groupsFrom"] == "groups?run=first"
    assert found["evaluations"][-1] == HOME and "connect-src &#39;self&#39;" in page
    assert "50.0" in page and '<h2 id="curves-title">Training curves</h2>' in page
    assert len(page) < 120_000


def test_runs_are_compared(server: Served) -> None:
    page = server.send("runs?run=first&run=study/grpo").text
    assert "study/grpo against first" in page and '<tr class="differs"><td>train.steps</td>' in page
    assert json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])["runs"] == ["first", "study/grpo"]
    many = "&".join(f"run=r{number}" for number in range(7))
    for given in ("", many):
        assert server.send(f"runs?{given}").status == 400


def test_answers_come_in_pages(server: Served, root: Path) -> None:
    evaluations = shown_evaluations([read_run(root / "first")], every=True)
    before = next(name for name in evaluations if name.startswith("before_home"))
    questions = merge_answers({name: evaluations[name].records() for name in (HOME, before)})
    for given, query in (
        ({}, Query(HOME)),
        ({"outcome": "right", "q": "which"}, Query(HOME, outcome="right", words="which")),
        ({"against": before, "flip": "lost"}, Query(HOME, against=before, flip="lost")),
        ({"group": "answer_type: choice", "answer": "n"}, Query(HOME, group="answer_type: choice", answer="n")),
    ):
        wanted = [next(iter(question.values())).sample_id for question in select(questions, query)]
        found = [asked(server, page=str(page), **given) for page in (1, 2, 3, 99)]
        ids = [[entry["id"] for entry in one["entries"]] for one in found]
        last = max(0, len(wanted) - 1) // PAGE * PAGE
        assert ids == [wanted[:10], *(wanted[first:][:10] or wanted[last:] for first in (10, 20, 980))]
        assert {(one["matching"], one["total"]) for one in found} == {(len(wanted), 24)}
    assert asked(server, eval="nothing")["matching"] == 0
    assert asked(server, page="-1")["entries"] == asked(server, page="x")["entries"] == asked(server)["entries"]


def test_images_are_those_of_the_questions(server: Served) -> None:
    data = load_dataset(DataConfig(num_test=24), "test")
    for index, entry in enumerate(asked(server)["entries"]):
        (address,) = entry["images"]
        answer = server.send(address)
        with Image.open(io.BytesIO(answer.body)) as image:
            one, other = (np.asarray(each.convert("RGB"), float) for each in (image, data[index].images[0].load()))
        assert answer.headers["content-type"] in ("image/png", "image/jpeg") and np.abs(one - other).mean() < 8
    assert server.send(address.replace("number=0", "number=1")).status == 404
    assert server.send(address.replace("phantom-test", "nobody")).status == 404


def test_what_cannot_be_read_is_a_sentence_without_folders(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "one")
    (run / "eval" / "step_000040" / "samples.jsonl").write_text("{}\n")
    with serve(tmp_path / "runs") as server:
        for path in ("answers?run=one&eval=" + quote("step 40 (phantom/home/val)"), "runs?run=none", "groups?run=x"):
            answer = server.send(path)
            assert answer.status == 404 and str(tmp_path) not in answer.text and answer.text.endswith(".")
        assert "Line 1 of samples.jsonl" in server.send("answers?run=one&eval=step+40+(phantom/home/val)").text
        page = server.send("runs?run=one").text
        assert "cannot be compared: Line 1 of samples.jsonl" in page and str(tmp_path) not in page


def test_training_groups_come_with_their_images(server: Served) -> None:
    found = json.loads(server.send("groups?run=first").text)
    assert [len(group["completions"]) for group in found["groups"]] == [3] * 8 and found["notes"] == []
    assert all(found["images"][key].startswith("data:image/") for group in found["groups"] for key in group["images"])


def test_a_page_that_has_not_changed_is_not_sent_again(server: Served) -> None:
    for path in ("", "runs?run=first"):
        tag = server.send(path).headers["etag"]
        again = server.send(path, if_none_match=tag)
        assert (again.status, again.body) == (304, b"")
        assert server.send(path, if_none_match='"other"').status == 200


# --- who is answered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "A-token", "a-toke", "a-token2", "a-token%00", quote("ä-token"), ".", "%2e%2e"])
@pytest.mark.parametrize("path", ["", "runs?run=first", "image?run=first", "nothing"])
def test_nothing_is_answered_without_the_token(server: Served, token: str, path: str) -> None:
    answer = server.send(path, token=token)
    assert answer.status == 404 and "Open the address that `medvqa-rl view` printed" in answer.text
    assert TOKEN not in answer.text and "first" not in answer.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("127.0.0.1", 200), ("localhost:9", 200), ("127.0.0.1:80", 200), ("[::1]:5", 200)),
        *(("evil.example", 421), ("127.0.0.1.evil.example", 421), ("evil.example:80", 421), ("10.0.0.1", 421)),
        *(("", 421), ("localhost@evil.example", 421), ("evil.example#localhost", 421), ("[::", 421)),
    ],
)
def test_only_names_of_this_machine_are_answered(server: Served, host: str, status: int) -> None:
    assert server.send(host=host).status == status


def test_every_answer_forbids_embedding_and_keeps_the_address_secret(server: Served) -> None:
    image = asked(server)["entries"][0]["images"][0]
    for answer in (
        *(server.send(path) for path in ("", "runs?run=first", "answers?run=first", image, "groups?run=first")),
        *(server.send(token="x"), server.send("nothing"), server.send(host="evil.example"), server.send("runs")),
    ):
        assert answer.headers["content-security-policy"].startswith("frame-ancestors 'none'")
        assert answer.headers["x-frame-options"] == "DENY" and answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers or "medvqa" not in answer.headers["server"]


def test_only_own_pages_may_send(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"http://127.0.0.1:{server.port}"
    for path in ("", "runs?run=first", "answers?run=first"):
        assert server.send(path, data=b"x").status == 403
        assert server.send(path, data=b"x", origin="http://evil.example").status == 403
        assert server.send(path, data=b"x", origin=f"http://127.0.0.1:{server.port + 1}").status == 403
        assert server.send(path, data=b"x", origin="null").status == 403
        assert server.send(path, data=b"x", origin=own).status == 405
    monkeypatch.setattr(guard, "MAX_BODY", 10)
    assert server.send("runs?run=first", data=b"x" * 11, origin=own).status == 413


@pytest.mark.parametrize(
    "name", ["../runs/first", "/etc/passwd", "first/../first", "first/eval", "..", "%2e%2e", "first\0"]
)
def test_no_path_leaves_the_folder(server: Served, name: str) -> None:
    for path in ("runs", "answers", "groups", "image"):
        answer = server.send(f"{path}?{urlencode({'run': name, 'eval': 'after_home', 'id': 'x'})}")
        assert answer.status == 404 and answer.text.startswith("There is no run")
    answer = server.send(quote(f"../{name}"))
    assert answer.status == 404
    assert server.send(f"image?run=first&eval={quote('../eval/after_home')}&id=phantom-test-0-0").status == 404


def test_hidden_names_stay_hidden(tmp_path: Path) -> None:
    """An image named after a patient, with data.hide_names: no answer of the server has the name."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(4):
        Image.new("L", (40, 40), 60 * number).save(folder / f"Mueller_{number}.png")
        row = {"id": f"Mueller {number}", "image": f"Mueller_{number}.png"}
        rows.append(row | {"question": f"Is it {number}?", "answer": "yes"})
    for split in ("train", "val", "test"):
        write_lines(folder / f"{split}.jsonl", rows)
    (folder / "Mueller_3.png").write_bytes(b"damaged")
    data = {"name": "own", "path": str(folder), "hide_names": True}
    run = make_run(tmp_path / "runs" / "one")
    config = Config.model_validate({"output_dir": str(run), "data": data})
    write(run / "config.resolved.json", config.model_dump(mode="json"))
    sets = {split: load_dataset(config.data, split) for split in ("train", "test")}  # type: ignore[arg-type]
    train, test = sets["train"], sets["test"]
    write(
        run / "data.json", {"train": {"name": train.name, "fingerprint": train.fingerprint, "samples": 4, "notes": {}}}
    )
    for path in run.glob("samples/*"):
        path.unlink()
    rows = [row for index in range(4) for row in completion_rows(1, train[index], [("yes", "right"), ("no", "wrong")])]
    write_lines(run / "samples" / "step_000001.jsonl", rows)
    records = [
        make_record(
            sample_id=test[index].id, image_key=test[index].image_key, question=test[index].question, dataset="own"
        )
        for index in range(4)
    ]
    results = summarise(records, EvalConfig(bootstrap=20)) | {"config": config.model_dump(mode="json")}
    write(
        run / "eval" / "own" / "results.json", results | {"dataset": {"name": "own", "fingerprint": test.fingerprint}}
    )
    write_records(records, run / "eval" / "own" / "samples.jsonl")
    with serve(tmp_path / "runs") as server:
        answers = server.send("answers?run=one&eval=own+(own)")
        images = [address for entry in json.loads(answers.text)["entries"] for address in entry["images"]]
        found = [server.send(path) for path in ("", "runs?run=one", "groups?run=one", *images)]
    assert [answer.status for answer in found] == [200] * 6 + [404]
    assert len(json.loads(found[2].text)["images"]) == 3
    for answer in (answers, *found):
        assert b"mueller" not in answer.body.lower() and "mueller" not in str(answer.headers).lower()


def test_hostile_text_stays_text(server: Served) -> None:
    shown = EVIL.encode("utf-8", "replace").decode()
    assert any(shown[:-1] in entry["question"] for entry in asked(server)["entries"])
    assert "<script>" not in server.send("answers?" + urlencode({"run": "first", "eval": HOME})).text


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_stopped(root: Path) -> None:
    command = [sys.executable, "-m", "medvqa_rl", "view", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+/[\w-]{22}/", line)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, timeout=60) as found:
            assert b"study/grpo" in found.read()
        port = address.split(":")[2].split("/")[0]
        taken = CliRunner().invoke(app, ["view", str(root), "--port", port])
        assert taken.exit_code == 2 and f"Port {port} of 127.0.0.1 is in use by another program: " in taken.output
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130 and "Traceback" not in process.stderr.read()


def test_a_missing_extra_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    gone = ["uvicorn"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    result = CliRunner().invoke(app, ["view", str(root)])
    assert result.exit_code == 2
    assert "`medvqa-rl view` needs uvicorn, which is not installed: run `pip install 'medvqa-rl[view]'`." in " ".join(
        result.output.split()
    )
    gone.append("python_multipart")
    assert "needs uvicorn, python_multipart, which are not" in CliRunner().invoke(app, ["view", str(root)]).output


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["view", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "give the folder that holds the runs" in result.output
