"""Image names as other systems write them.

Run: pytest tests/data/reading/test_folder.py
"""

from pathlib import Path

import pytest

from medvqa_rl.data.reading.folder import EMPTY, MISSING, OUTSIDE, SEVERAL, ImageFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "ours" / "images"
    for name in (
        "a.png",
        "sub/b.JPG",
        "1.2.840.113.dcm",
        "1.2.840.113.5",
        "v.nii.gz",
        "two.png",
        "two.jpg",
        "notes.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "void.png").touch()
    (root / "images").mkdir()
    (root / "images" / "deep.png").write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "link").symlink_to(root)
    return root


@pytest.mark.parametrize(
    ("name", "path", "problem"),
    [
        ("sub\\b.JPG", "sub/b.JPG", ""),
        (".\\sub\\b.JPG", "sub/b.JPG", ""),
        ("images/a.png", "a.png", ""),
        ("ours/images/a.png", "a.png", ""),
        ("images\\sub\\b", "sub/b.JPG", ""),
        ("images/deep.png", "images/deep.png", ""),  # as it is, before the folder's own name is removed
        ("a", "a.png", ""),
        ("v", "v.nii.gz", ""),
        ("1.2.840.113", "1.2.840.113.dcm", ""),  # not 1.2.840.113.5
        ("1.2.840", "1.2.840", MISSING),
        ("two", "two", SEVERAL),
        ("void", "void.png", EMPTY),
        ("notes", "notes", MISSING),
        ("sub", "sub", MISSING),
        ("other/a.png", "other/a.png", MISSING),
        ("images/../../secret.png", "images/../../secret.png", OUTSIDE),
        ("images\\..\\..\\secret.png", "images\\..\\..\\secret.png", OUTSIDE),
        ("C:\\images\\a.png", "C:\\images\\a.png", OUTSIDE),
        ("\\\\server\\images\\a.png", "\\\\server\\images\\a.png", OUTSIDE),
    ],
)
def test_names(root: Path, name: str, path: str, problem: str) -> None:
    assert ImageFolder(root).find(name) == (path, problem)


def test_absolute_names_inside_the_folder(root: Path, tmp_path: Path) -> None:
    for given in (root, tmp_path / "link"):
        folder = ImageFolder(given)
        for prefix in {root, given}:
            assert folder.find(str(prefix / "sub" / "b.JPG")) == ("sub/b.JPG", "")
            assert folder.find(str(prefix / "sub" / "b")) == ("sub/b.JPG", "")
            outside = str(prefix / ".." / ".." / "secret.png")
            assert folder.find(outside) == (outside, OUTSIDE)
        assert folder.find(str(tmp_path / "secret.png"))[1] == OUTSIDE
        assert folder.find(f"{root}s/a.png")[1] == OUTSIDE
