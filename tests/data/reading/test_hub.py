"""Data sets from the Hub: pinned to a commit, offline after the first load.

Run: pytest tests/data/reading/test_hub.py
"""

import importlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from medvqa_rl.config import DataConfig, JudgeConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.reading import hub
from medvqa_rl.evaluation.measures.fluency import load_language_model
from medvqa_rl.models.loading import resolve_folder
from medvqa_rl.rewards.judges.load import load_judge

REVISION = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A repository in a folder, in place of the network and the Hub's cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[bool] = []
        self.is_cached = False
        self.is_online = True

    def snapshot_download(self, repository: str, **how: Any) -> str:
        assert how["repo_type"] == "dataset" and how["revision"] == REVISION and how["allow_patterns"]
        offline = how["local_files_only"]
        self.calls.append(offline)
        if offline and not self.is_cached:
            raise LocalEntryNotFoundError("not there")
        if not offline and not self.is_online:
            raise OSError("no network")
        self.is_cached = True
        return str(self.folder)


@pytest.mark.parametrize("error", ["ProxyError", "ConnectError", "ReadTimeout", "HfHubHTTPError"])
def test_whatever_stops_a_download_is_one_sentence(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = importlib.import_module(huggingface_hub.errors.HTTPError.__module__.partition(".")[0])

    def fail(*arguments: Any, **options: Any) -> str:
        if error == "HfHubHTTPError":
            response = client.Response(403, request=client.Request("GET", "https://huggingface.co"))
            raise huggingface_hub.errors.HfHubHTTPError("403 Forbidden\n\nfor url", response=response)
        raise getattr(client, error)("403 Forbidden\nby the proxy")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    loads: dict[str, Callable[[], object]] = {
        "The data set someone/SLAKE at": lambda: load_dataset(config(tmp_path), "train"),
        "model.path is 'someone/model'": lambda: resolve_folder("someone/model"),
        "judge.model is 'someone/judge'": lambda: load_judge(JudgeConfig(model="someone/judge")),
        "The language model someone/lm": lambda: load_language_model("someone/lm", "cpu"),
    }
    for start, load in loads.items():
        with pytest.raises(ValueError, match=f"^{start}") as found:
            load()
        reason = error if start.startswith(("model", "judge")) else "403 Forbidden"
        assert reason in str(found.value) and "\n" not in str(found.value)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    rows = [
        {"img_name": f"xmlab{i}/source.jpg", "question": f"Q{i}?", "answer": "Yes", "q_lang": "en", "qid": i}
        | {"answer_type": "CLOSED"}
        for i in range(3)
    ]
    for name in ("train", "validation", "test"):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "JPEG")
    with zipfile.ZipFile(folder / "imgs.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"imgs/xmlab{i}/source.jpg", picture.getvalue())
    repository = FakeHub(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
    return repository


def config(tmp_path: Path, **changes: Any) -> DataConfig:
    settings = {"name": "slake_en", "hub": "someone/SLAKE", "revision": REVISION, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(**(settings | changes))


def test_the_first_load_downloads_and_later_ones_are_offline(
    fake: FakeHub, tmp_path: Path, wrong_gold: Callable[..., list[str]]
) -> None:
    first = load_dataset(config(tmp_path), "train")
    fake.is_online = False
    second = load_dataset(config(tmp_path), "val")
    assert fake.calls == [False, True]
    assert len(first) == len(second) == 3 and first[0].images[0].load().size == (8, 8)
    assert wrong_gold(first) == []
    # The Hub's cache was emptied: it is downloaded again, or refused in a sentence.
    fake.is_cached = False
    with pytest.raises(
        ValueError, match=r"someone/SLAKE at 0123.* cannot be downloaded \(no network\): check data\.hub"
    ):
        load_dataset(config(tmp_path), "train")
    fake.is_online = True
    assert len(load_dataset(config(tmp_path), "train")) == 3


def test_revisions_other_than_commits_are_refused(fake: FakeHub, tmp_path: Path) -> None:
    for revision in ("main", "v1.0", REVISION[:-1], REVISION.upper()):
        with pytest.raises(ValueError, match=r"data\.revision is .*, but must be a commit of someone/SLAKE"):
            load_dataset(config(tmp_path, revision=revision), "train")
    assert not fake.calls


def test_an_invalid_repository_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"which is not a repository name: write owner/name"):
        hub.download("a/b/c", REVISION, ["*"], tmp_path)
