"""Archives are unpacked once and safely, images are stored once.

Run: pytest tests/data/reading/test_unpack.py
"""

import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.core.files import partial_path
from medvqa_rl.data.reading.unpack import store_image, unpack_zips


def archive(path: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in names.items():
            file.writestr(name, data)
    return path


def test_archives_are_unpacked_once_unless_they_change(tmp_path: Path) -> None:
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


def test_others_may_read_what_is_unpacked_if_the_umask_says_so(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = unpack_zips([archive(tmp_path / "a.zip", {"b/c.png": b"1"})], tmp_path / "cache")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "b", folder / "b" / "c.png")] == [
        *(0o755, 0o755, 0o644),
    ]


def test_missing_and_damaged_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no archive 'a\.zip'"):
        unpack_zips([tmp_path / "a.zip"], tmp_path)
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match=r"a\.zip cannot be unpacked"):
        unpack_zips([tmp_path / "a.zip"], tmp_path)


def test_an_archive_with_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("\u00ff.png", b"x")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace("\u00ff".encode(), b"\xff\xfe"))  # still marked as UTF-8
    with pytest.raises(ValueError, match=r"a\.zip cannot be unpacked .*invalid start byte"):
        unpack_zips([tmp_path / "a.zip"], tmp_path / "cache")
    assert list((tmp_path / "cache" / "unpacked").iterdir()) == []


def test_a_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medvqa_rl.data.reading.unpack.MAX_BYTES", 10)
    with pytest.raises(ValueError, match="would unpack to more than"):
        unpack_zips([archive(tmp_path / "a.zip", {"a": bytes(11)})], tmp_path)


def test_a_full_disk_is_not_a_damaged_archive(tmp_path: Path, file_limit: Any) -> None:
    path = archive(tmp_path / "a.zip", {"a.png": bytes(9000)})
    cache, message = tmp_path / "cache", r"a\.zip cannot be unpacked in .* \(File too large\): make room"
    with pytest.raises(ValueError, match=message), file_limit(999):
        unpack_zips([path], cache)
    assert not list((cache / "unpacked").iterdir())
    assert (unpack_zips([path], cache) / "a.png").stat().st_size == 9000


def test_equal_images_get_equal_names(tmp_path: Path) -> None:
    names = [store_image(data, tmp_path) for data in (b"\x89PNG1", b"\x89PNG1", b"\xff\xd8\xff2", b"other")]
    assert names[0] == names[1] and [name[-4:] for name in names] == [".png", ".png", ".jpg", ".bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(set(names))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "contains an entry without a name"),
        ("./", "contains an entry without"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_entries_without_a_usable_name_are_refused_in_a_short_sentence(
    tmp_path: Path, name: str, message: str
) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(ValueError, match=message) as caught:
        unpack_zips([archive], tmp_path / "cache")
    assert len(str(caught.value)) < 500
    assert list((tmp_path / "cache" / "unpacked").iterdir()) == []


def test_what_a_killed_process_unpacked_is_removed(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("a.png", b"x")
    folder = unpack_zips([archive], tmp_path / "cache")
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = partial_path(folder).name
    left = folder.with_name(name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    own = folder.with_name(name)
    for made in (left, own):
        (made / "inside").mkdir(parents=True)
    assert unpack_zips([archive], tmp_path / "cache") == folder
    assert own.is_dir() and not left.exists()
