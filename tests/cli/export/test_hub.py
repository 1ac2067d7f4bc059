"""``medvqa-rl export --push-to-hub`` against the Hub's routes on this machine.

Run: pytest tests/cli/export/test_hub.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from click.testing import Result
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import LoraConfig
from medvqa_rl.models.checkpoints import write_model
from tests.report.synthetic import make_run

NAME = "clinic/model"
CARD = "---\nlibrary_name: transformers\n---\n# A model\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Hub that this process takes for the real one, with a token that may write."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "fakes"))
    from hub import TOKEN, running

    with running() as started:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", started.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        quick = SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
        monkeypatch.setattr("huggingface_hub.utils._http.time", quick)  # waits between attempts
        yield started


@pytest.fixture
def model(tiny_policy: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint with a card."""
    write_model(tiny_policy(), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(CARD, encoding="utf-8")
    return tmp_path / "model"


def export(source: Path, *arguments: str) -> Result:
    """Export to ``new`` beside the source, and upload."""
    words = ["export", str(source), str(source.parent / "new"), "--push-to-hub", NAME, *arguments]
    result = CliRunner().invoke(app, words)
    assert "Traceback" not in result.output and "hf_a_secret_token" not in result.output
    return result


def test_a_model_goes_to_a_new_private_repository_with_its_card(hub: Any, model: Path) -> None:
    (model / "best.json").write_text("{}")
    (model / "trainer").mkdir()
    (model / "trainer" / "optimizer.safetensors").write_bytes(b"x")
    result = export(model)
    assert result.exit_code == 0, result.output
    assert f"Uploaded to {hub.url}/{NAME}, which only those with access can read." in result.output
    repository = hub.repositories[NAME]
    assert repository["private"] is True
    written = {path.name: path.read_bytes() for path in (model.parent / "new").iterdir()}
    assert repository["files"] == written and written["README.md"].decode() == CARD
    assert "model.safetensors" in written and not written.keys() & {"best.json", "trainer", "optimizer.safetensors"}


@pytest.mark.parametrize("flags", [(), ("--public",)])
def test_an_existing_repository_keeps_who_can_read_it(hub: Any, model: Path, flags: tuple[str, ...]) -> None:
    hub.repositories[NAME] = {"private": True, "files": {"old.txt": b"x"}}
    assert "which only those with access can read" in export(model, *flags).output
    assert hub.repositories[NAME]["private"] and "old.txt" in hub.repositories[NAME]["files"]


def test_a_public_repository_is_used_only_if_that_was_asked_for(hub: Any, model: Path) -> None:
    hub.repositories[NAME] = {"private": False, "files": {}}
    result = export(model)
    assert result.exit_code == 2 and f"The repository {NAME} exists and everyone can read it: add --public" in (
        result.output
    )
    assert not (model.parent / "new").exists() and not hub.repositories[NAME]["files"]
    assert "which everyone can read" in export(model, "--public").output
    assert "README.md" in hub.repositories[NAME]["files"]


def test_a_new_public_repository(hub: Any, model: Path) -> None:
    assert "which everyone can read" in export(model, "--public").output
    assert hub.repositories[NAME]["private"] is False


def test_a_repository_that_became_public_meanwhile_gets_nothing(
    hub: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = hub.route

    def race(method: str, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            hub.repositories[NAME] = {"private": False, "files": {}}
        return route(method, path, body)

    monkeypatch.setattr(hub, "route", race)
    result = export(model)
    assert result.exit_code == 2 and "everyone can read it" in result.output
    assert not hub.repositories[NAME]["files"]


@pytest.mark.parametrize(
    ("path", "status", "message", "is_written"),
    [
        ("/api/models/clinic", 401, r"refuses clinic/model (HTTP 401: refused with 401): log in again with", False),
        ("/api/models/clinic", 0, "The upload to clinic/model failed (", False),
        ("repos/create", 403, "refuses clinic/model (HTTP 403: refused with 403): take a token that may write", True),
        ("/commit/", 403, "(HTTP 403: refused with 403): take a token that may write to this owner's", True),
        ("/blobs/", 403, "The upload to clinic/model failed (", True),
        ("/blobs/", 0, "The upload to clinic/model failed (", True),
        ("/commit/", 0, "The upload to clinic/model failed (", True),
    ],
)
def test_a_refusal_or_a_broken_upload_is_one_sentence(
    hub: Any, model: Path, path: str, status: int, message: str, is_written: bool
) -> None:
    hub.refused[path] = status
    result = export(model)
    printed = " ".join(result.output.split())
    assert result.exit_code == 2 and message in printed, printed
    assert (model.parent / "new" / "model.safetensors").is_file() is is_written
    state = f"new is complete, and `hf upload {NAME} " if is_written else "nothing was written"
    assert state in printed
    assert not hub.repositories.get(NAME, {"files": {}})["files"]


def test_what_cannot_be_uploaded_is_refused_before_anything_is_written(
    hub: Any, model: Path, tiny_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(result: Result, message: str) -> None:
        printed = " ".join(result.output.split())
        assert result.exit_code == 2 and message in printed, printed
        assert not (model.parent / "new").exists() and not hub.requests

    adapter = model.parent / "adapter"
    write_model(tiny_policy(lora=LoraConfig(rank=2)), adapter)
    refused(export(adapter), "adapter has no model card (README.md), and is in no run")
    (adapter / "README.md").write_text(CARD, encoding="utf-8")
    refused(export(adapter), "The adapter names its base model by a folder of this machine (")
    refused(export(adapter, "--merge"), "adapter has no model card (README.md), and is in no run")
    (model / "README.md").unlink()
    refused(export(model), "model has no model card (README.md)")
    result = CliRunner().invoke(app, ["export", str(model), str(model.parent / "new"), "--push-to-hub", "name"])
    refused(result, "--push-to-hub is 'name', but should be the owner and the name of a repository, as OWNER/NAME.")
    result = CliRunner().invoke(app, ["export", str(model), str(model.parent / "new"), "--public"])
    refused(result, "--public says who may read an uploaded model: add --push-to-hub OWNER/NAME, or leave it out.")
    monkeypatch.setattr("medvqa_rl.cli.export.hub.get_token", lambda: None)
    refused(export(model), "needs a token of the Hugging Face Hub that may write: log in with `hf auth login`")
    monkeypatch.setattr("medvqa_rl.cli.export.hub.is_off", lambda: True)
    refused(export(model), "--push-to-hub uploads the model, but the network is off: leave it out, or turn")


def test_a_run_without_a_network_is_not_uploaded(hub: Any, tiny_policy: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model={"path": "owner/base"}, network="off")
    write_model(tiny_policy(), run / "best")
    result = export(run)
    assert result.exit_code == 2 and "have network: off, so its model is not uploaded" in " ".join(
        result.output.split()
    )
    assert not hub.requests and not (tmp_path / "new").exists()
    make_run(tmp_path / "run", model={"path": "owner/base"})
    assert export(run).exit_code == 0
    assert b"Weights of `owner/base`" in hub.repositories[NAME]["files"]["README.md"]


def test_an_adapter_of_a_model_on_the_hub(hub: Any, tiny_policy: Callable[..., Any], tmp_path: Path) -> None:
    write_model(tiny_policy(lora=LoraConfig(rank=2)), tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    given = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": "Qwen/Qwen2-VL-2B"}
    settings.write_text(json.dumps(given), encoding="utf-8")
    (tmp_path / "adapter" / "README.md").write_text(CARD, encoding="utf-8")
    result = export(tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert "adapter_model.safetensors" in hub.repositories[NAME]["files"]
    texts = b"".join(data for name, data in hub.repositories[NAME]["files"].items() if name.endswith(".json"))
    assert str(tmp_path).encode() not in texts
