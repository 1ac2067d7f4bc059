"""Data sets from the Hub: pinned, offline after the first load; archives unpacked once and safely.

Run: pytest tests/data/reading/test_hub.py
"""

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

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.reading import hub
from medvqa_rl.data.reading.unpack import store_image, unpack_zips

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


def test_the_first_load_downloads_and_later_ones_ask_no_network(
    fake: FakeHub, tmp_path: Path, gold_scores_1: Callable[..., None]
) -> None:
    first = load_dataset(config(tmp_path), "train")
    fake.is_online = False
    second = load_dataset(config(tmp_path), "val")
    assert fake.calls == [False, True]
    assert len(first) == len(second) == 3 and first[0].images[0].load().size == (8, 8)
    gold_scores_1(first)
    # The Hub's cache was emptied: it is downloaded again, or refused in a sentence.
    fake.is_cached = False
    with pytest.raises(
        ValueError, match=r"someone/SLAKE at 0123.* cannot be downloaded \(no network\): check data\.hub"
    ):
        load_dataset(config(tmp_path), "train")
    fake.is_online = True
    assert len(load_dataset(config(tmp_path), "train")) == 3


def test_only_a_commit_pins(fake: FakeHub, tmp_path: Path) -> None:
    for revision in ("main", "v1.0", REVISION[:-1], REVISION.upper()):
        with pytest.raises(ValueError, match=r"data\.revision is .*, but must be a commit of someone/SLAKE"):
            load_dataset(config(tmp_path, revision=revision), "train")
    assert not fake.calls


def test_an_invalid_repository_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"which is not a repository name: write owner/name"):
        hub.download("a/b/c", REVISION, ["*"], tmp_path)


# --- archives -----------------------------------------------------------------------------------------------------


def archive(path: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in names.items():
            file.writestr(name, data)
    return path


def test_archives_are_unpacked_once_and_anew_when_changed(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"images/a.png": b"1"})
    folder = unpack_zips([path], tmp_path / "cache")
    assert (folder / "images" / "a.png").read_bytes() == b"1"
    (folder / "note").touch()
    assert unpack_zips([path], tmp_path / "cache") == folder and (folder / "note").exists()
    archive(path, {"images/a.png": b"22"})
    assert (unpack_zips([path], tmp_path / "cache") / "images" / "a.png").read_bytes() == b"22"
    assert len(list((tmp_path / "cache" / "unpacked").iterdir())) == 2  # nothing half done is left


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "a.zip", {"ok": b"1", name: b"2"})
    with pytest.raises(ValueError, match="leaves its folder"):
        unpack_zips([path], tmp_path / "cache")
    assert not list((tmp_path / "cache" / "unpacked").iterdir()) and not (tmp_path / "evil").exists()


def test_missing_and_damaged_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no archive 'a\.zip'"):
        unpack_zips([tmp_path / "a.zip"], tmp_path)
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match=r"a\.zip cannot be unpacked"):
        unpack_zips([tmp_path / "a.zip"], tmp_path)


def test_a_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medvqa_rl.data.reading.unpack.MAX_BYTES", 10)
    with pytest.raises(ValueError, match="would unpack to more than"):
        unpack_zips([archive(tmp_path / "a.zip", {"a": bytes(11)})], tmp_path)


def test_equal_images_get_equal_names(tmp_path: Path) -> None:
    names = [store_image(data, tmp_path) for data in (b"\x89PNG1", b"\x89PNG1", b"\xff\xd8\xff2", b"other")]
    assert names[0] == names[1] and [name[-4:] for name in names] == [".png", ".png", ".jpg", ".bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(names))
