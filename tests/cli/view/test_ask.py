"""Asking the model of a run: the form's fields, uploads, answers with votes and reward parts, one at a time.

Run: pytest tests/cli/view/test_ask.py
"""

from __future__ import annotations

import http.client
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Page
from PIL import Image
from synthetic import EVIL, make_run, write, write_evaluation

from medvqa_rl.cli.ask import sample_answers
from medvqa_rl.cli.view import guard
from medvqa_rl.cli.view.asking import Asker, model_choices, read_question, read_upload
from medvqa_rl.config import Config, DataConfig
from medvqa_rl.core.answers import is_correct, parse_completion
from medvqa_rl.data import load_dataset
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.models.checkpoints import model_for
from medvqa_rl.models.loading import load_policy
from medvqa_rl.report.runs import StoredRun, read_run
from tests.cli.view.conftest import Answer, Served, serve

FORM = {"question": "Which organ?", "count": "4", "temperature": "1.0", "max_length": "48", "seed": "3"}
IMAGE = MemoryImage("image", Image.new("RGB", (30, 30)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded model that rewards format, correctness, length and, by a judge, coherence."""
    root = tmp_path_factory.mktemp("ask") / "runs"
    run = make_run(root / "one", rewards={"ecr": 1.0, "semantic": 1.0})
    write_evaluation(run / "eval", "home", 24)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Served]:
    with serve(root) as served:
        yield served


def send(server: Served, fields: Mapping[str, str], upload: tuple[str, bytes] | None = None, **headers: str) -> Answer:
    """Send the form as a browser does."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    data = "".join(parts).encode()
    name, content = upload or ("", b"")
    data += f'--x\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    data += content + b"\r\n--x--\r\n"
    given = {"content_type": "multipart/form-data; boundary=x", "origin": f"http://127.0.0.1:{server.port}", **headers}
    return server.send("ask?run=one", data=data, **given)


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


# --- fields and uploads ---------------------------------------------------------------------------------------------


def test_a_question_is_read_from_the_form() -> None:
    asked = read_question(FORM | {"options": " left \r\n\r\nright\n", "gold": "right"}, [IMAGE])
    assert asked.sample.options == ("left", "right") and asked.sample.answer == "B" and asked.has_gold
    assert (asked.count, asked.temperature, asked.max_length, asked.seed) == (4, 1.0, 48, 3)
    asked = read_question(FORM, [IMAGE])
    assert asked.sample.answer_type == "open" and asked.sample.answer == "" and not asked.has_gold


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, "The question is empty"),
        ({"options": "one"}, "There are 1 options, but a choice question needs 2 to 26"),
        ({"options": "a\nb", "gold": "c"}, "The gold answer 'c' is none of the options"),
        ({"count": "0"}, "count is '0': give a whole number from 1 to 32."),
        ({"count": "33"}, "from 1 to 32"),
        ({"count": "1.5"}, "give a whole number"),
        ({"temperature": "nan"}, "temperature is 'nan': give a number from 0.001 to 10."),
        ({"max_length": "10000"}, "from 1 to 8192"),
        ({"seed": "-1"}, "seed is '-1'"),
    ],
)
def test_bad_fields_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_question(FORM | changes, [IMAGE])
    with pytest.raises(ValueError, match="There is no image"):
        read_question(FORM, [])


def test_uploads_are_decoded_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    image = read_upload("../../Mueller.png", png())
    assert image.key == "image" and image.load().size == (40, 30) and image.load().getpixel((0, 0)) == (255, 0, 0)
    for name, data in (("x.png", b"nothing"), ("x.nii.gz", b"nothing"), ("x.dcm", b"nothing"), ("x.eps", b"%!PS")):
        with pytest.raises(ValueError, match=r"The image \S*image\S* cannot be (decoded|read)"):
            read_upload(name, data)
    monkeypatch.setattr("medvqa_rl.data.images.files.MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="has 40 x 30 pixels, but at most 1,000 are decoded"):
        read_upload("x.png", png())
    assert list(tmp_path.iterdir()) == []


def test_the_models_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    assert model_choices(read_run(run)) == {"initial": "the model before training"}
    for name in ("checkpoints/step_000020", "checkpoints/step_000040", "best"):
        (run / name).mkdir(parents=True)
    write(run / "best" / "best.json", {"step": 20, "accuracy": 0.5})
    assert model_choices(read_run(run)) == {
        "best": "best checkpoint, of step 20",
        "step_000040": "checkpoint of step 40",
        "step_000020": "checkpoint of step 20",
        "initial": "the model before training",
    }
    assert model_choices(StoredRun(run)) == {}


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model_with_their_votes_and_parts(root: Path) -> None:
    data = load_dataset(DataConfig(num_test=24), "test")
    sample = next(data[index] for index in range(24) if data[index].options)
    form = FORM | {"question": sample.question, "options": "\n".join(sample.options), "gold": sample.answer}
    asked = read_question(form, sample.images)
    asker, run = Asker(), read_run(root / "one")
    found = asker.ask(run, "initial", asked)
    policy = load_policy(model_for("phantom:instruct"))
    assert run.config["model"]["path"] == "phantom:instruct"
    group = sample_answers(
        policy, asked.sample, "think_answer", count=4, temperature=1.0, seed=3, max_length=48
    )  # fmt: skip
    assert [answer["text"] for answer in found["answers"]] == [one.text for one in group.completions]
    assert asker.ask(run, "initial", asked) == found
    target = Config.model_validate(run.config).rewards.length_target
    for answer, completion in zip(found["answers"], group.completions):
        parsed = parse_completion(completion.text, "think_answer", group.wording)
        right = is_correct(sample, parsed.answer)
        tokens = policy.processor.count_tokens(parsed.think or "")
        assert dict(answer["parts"]) == {
            "format": float(parsed.is_well_formed),
            "correctness": float(right),
            "ecr": pytest.approx(min(1.0, tokens / target), abs=1e-4),
        }
        assert answer["outcome"] == ("none" if parsed.answer is None else "right" if right else "wrong")
        assert answer["tokens"] == len(completion.token_ids)
    votes = Counter(answer["vote"] for answer in found["answers"])
    assert dict(map(tuple, found["votes"])) == votes and votes.total() == 4
    assert found["notes"] == ["Not computed here: semantic (a judge, a function or training is needed)."]


def test_without_a_gold_answer_nothing_is_called_right(root: Path) -> None:
    found = Asker().ask(read_run(root / "one"), "initial", read_question(FORM, [IMAGE]))
    assert {answer["outcome"] for answer in found["answers"]} <= {"answered", "none"}
    assert all([name for name, _ in answer["parts"]] == ["format", "ecr"] for answer in found["answers"])
    assert found["notes"][0] == "Give the gold answer to see correctness." and found["gold"] == ""


def test_one_question_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asker, run, asked = Asker(), read_run(root / "one"), read_question(FORM, [IMAGE])

    def ask_meanwhile(*args: Any, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match="Another question is being answered"):
            asker.ask(run, "initial", asked)
        raise ValueError("Stop.")

    with monkeypatch.context() as patch:
        patch.setattr("medvqa_rl.cli.view.asking.sample_answers", ask_meanwhile)
        with pytest.raises(ValueError, match=r"Stop\."):
            asker.ask(run, "initial", asked)
    assert len(asker.ask(run, "initial", asked)["answers"]) == 4  # the failure did not keep the lock


def test_a_full_gpu_is_a_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("medvqa_rl.cli.view.asking.sample_answers", fail)
    with pytest.raises(ValueError, match="does not fit into the free memory of the GPU: ask when nothing else"):
        Asker().ask(read_run(root / "one"), "initial", read_question(FORM, [IMAGE]))


@pytest.mark.parametrize("model", ["", "best", "../one", "step_000001", "checkpoints/step_000001"])
def test_only_models_of_the_run_are_loaded(root: Path, model: str) -> None:
    with pytest.raises(ValueError, match="has no model"):
        Asker().ask(read_run(root / "one"), model, read_question(FORM, [IMAGE]))


def test_settings_of_another_version_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    write(run / "config.resolved.json", {"data": {"name": "of a later version"}})
    with pytest.raises(ValueError, match="The settings of one are of another version"):
        Asker().ask(read_run(run), "initial", read_question(FORM, [IMAGE]))


# --- over the server ------------------------------------------------------------------------------------------------


def test_the_form_is_answered(server: Served) -> None:
    uploaded = send(server, FORM | {"model": "initial"}, ("Mueller.png", png()))
    assert uploaded.status == 200, uploaded.text
    assert len(json.loads(uploaded.text)["answers"]) == 4 and "Mueller" not in uploaded.text
    stored = send(server, FORM | {"model": "initial", "eval": "home", "id": "phantom-test-0-0"})
    assert stored.status == 200 and json.loads(stored.text)["answers"] != json.loads(uploaded.text)["answers"]
    for fields, upload, message in (
        ({"model": "initial"}, None, "There is no image"),
        ({"model": "initial", "eval": "home", "id": "nobody"}, None, "There is no image"),
        ({"model": "initial", "eval": "../eval/home", "id": "phantom-test-0-0"}, None, "There is no image"),
        ({"model": "initial"}, ("x.png", b"damaged"), "The image image cannot be decoded"),
        ({"model": "other"}, ("x.png", png()), "has no model 'other'"),
        ({"model": "initial", "count": "99"}, ("x.png", png()), "count is '99'"),
    ):
        answer = send(server, FORM | fields, upload)
        assert answer.status == 400 and message in answer.text and "/tmp" not in answer.text, answer.text
    assert send(server, FORM | {f"x{number}": "" for number in range(20)}).status == 400


def test_only_the_own_page_may_ask(server: Served) -> None:
    assert send(server, FORM, ("x.png", png()), origin="http://evil.example").status == 403
    assert send(server, FORM, ("x.png", png()), origin="null").status == 403


def test_large_uploads_are_refused(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY", 10_000)
    answer = send(server, FORM | {"model": "initial"}, ("x.png", b"x" * 20_000))
    assert answer.status == 413 and "give a smaller image" in answer.text
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)  # without a length
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Origin": f"http://127.0.0.1:{server.port}"}
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    body = iter([head, *[b"x" * 1000] * 20])
    connection.request("POST", f"{server.address.partition(str(server.port))[2]}ask?run=one", body, headers)
    assert connection.getresponse().status == 413


@pytest.mark.browser
@pytest.mark.parametrize(("width", "theme"), [(500, "dark"), (1400, "light")])
def test_asking_in_the_browser(tab: Page, server: Served, tmp_path: Path, width: int, theme: str) -> None:
    tab.look(width=width, theme=theme)
    tab.messages.clear()
    tab.open(server.address + "runs?run=one", "#a-eval=home%20(phantom%2Fhome%2Ftest)")
    tab.wait_for("document.querySelectorAll('#a-entries a').length === 10")
    tab.run("document.querySelector('#a-entries a').click()")
    tab.wait_for("document.title === 'Ask one' && document.readyState === 'complete'")
    assert tab.run("document.querySelector('[name=question]').value").startswith("Is the count of opacity three?")
    tab.run("document.querySelector('[name=max_length]').value = 32")
    tab.run("document.querySelector('form button').click()")
    tab.wait_for("document.querySelectorAll('#answers .completion').length === 8")
    assert tab.run("document.querySelector('#answers img').naturalWidth") > 0
    votes = tab.run("[...document.querySelectorAll('.votes li')].map(e => parseInt(e.textContent))")
    assert sum(votes) == 8 and votes == sorted(votes, reverse=True)
    assert "Not computed here: semantic" in tab.run("document.getElementById('answers').textContent")
    assert tab.run("document.documentElement.scrollWidth") == width
    # another image, a hostile question, and what the server refuses
    (tmp_path / "x.png").write_bytes(png())
    tab.send("DOM.enable")
    root = tab.send("DOM.getDocument")["root"]["nodeId"]
    node = tab.send("DOM.querySelector", nodeId=root, selector="[name=image]")["nodeId"]
    tab.send("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "x.png")])
    hostile = json.dumps(EVIL.replace("\ud800", ""))
    tab.run(f"document.querySelector('[name=question]').value = {hostile}")
    tab.run("document.querySelector('form button').click()")
    tab.wait_for("document.querySelector('#answers h3')?.textContent.startsWith('</script>')")
    assert tab.run("document.title") == "Ask one" and tab.run("document.querySelectorAll('main script').length") == 0
    assert tab.messages == []
    tab.run("document.querySelector('[name=options]').value = 'one'")
    tab.run("document.querySelector('form button').click()")
    tab.wait_for("document.getElementById('state').textContent.startsWith('There are 1 options')")
    assert all("400" in message for message in tab.messages)
    tab.messages.clear()


def test_the_page_of_a_run_without_settings_cannot_ask(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "runs", "alone", 4)
    with serve(tmp_path / "runs") as server:
        answer = server.send("ask?run=alone")
        assert answer.status == 404 and answer.text == "alone has no settings, so it has no model to ask."
        assert 'href="ask' not in server.send("runs?run=alone").text


def test_pixels_reach_the_model(root: Path) -> None:
    """Two images, two answers: the upload is what is looked at."""
    data = load_dataset(DataConfig(num_test=24), "test")
    run, asker = read_run(root / "one"), Asker()
    texts = []
    for index in (0, 2):
        buffer = io.BytesIO()
        data[index].images[0].load().save(buffer, "PNG")
        image = read_upload("x", buffer.getvalue())
        assert np.array_equal(np.asarray(image.load()), np.asarray(data[index].images[0].load()))
        found = asker.ask(run, "initial", read_question(FORM | {"temperature": "0.001"}, [image]))
        texts.append(found["answers"][0]["text"])
    assert texts[0] != texts[1]
