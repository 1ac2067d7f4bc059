"""Any bytes read as a table give rows, reported issues, or a ValueError, never another exception.

Run: pytest tests/data/reading/test_tables.py
"""

import csv
import io
import json
import string
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.core.answers import is_correct, parse_completion
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.data import load_dataset
from medvqa_rl.data.reading.folder import MISSING, OUTSIDE, ImageFolder
from medvqa_rl.data.reading.tables import WINDOWS_1252, Fields, TableReport, read_table
from medvqa_rl.data.sets.vqa_rad import FILE, REQUIRED
from medvqa_rl.data.stored import StoredDataset

HEADER = "image,question,answer\n"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of the property tests, which each write their table into it anew."""
    return tmp_path_factory.mktemp("scratch")


def read(path: Path, content: bytes) -> tuple[list[tuple[int, Fields]], TableReport]:
    path.write_bytes(content)
    report = TableReport(path.name)
    return list(read_table(path, report)), report


def own_folder(root: Path, name: str, content: bytes) -> StoredDataset:
    root = root / name.partition(".")[2]
    if not root.exists():
        (root / "images").mkdir(parents=True)
        (root / "images" / "a.png").write_bytes(b"x")
    (root / name).write_bytes(content)
    dataset = load_dataset(DataConfig(name="own", path=str(root), max_dropped=1.0), "test")
    assert isinstance(dataset, StoredDataset)
    return dataset


def check(root: Path, name: str, content: bytes) -> None:
    """Check that a table loads or raises a ValueError that names it, and that gold answers of its rows score 1."""
    try:
        dataset = own_folder(root, name, content)
    except ValueError as error:
        assert name in str(error) or "No question is left" in str(error)
        assert str(error).endswith((".", "none."))
        message = str(error).replace(str(root), "")
        assert len(message) < 1200 and message.isprintable()
        return
    for issue in dataset.issues:
        assert issue.file == name and issue.row >= 0 and issue.reason and issue.detail.isprintable()
    assert sum(issue.action == "dropped" for issue in dataset.issues) == len(
        {issue.row for issue in dataset.issues if issue.action == "dropped"}
    )
    for sample in dataset.samples:
        assert sample.images[0].key == "a.png"
        assert is_correct(sample, parse_completion(render_answer("seen", sample.answer)).answer)


# --- any bytes ----------------------------------------------------------------------------------------------------

SUFFIXES = ["csv", "jsonl", "parquet"]
CELLS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["a.png", "../a.png", "/etc/passwd", "", " ", '"', "'", "\0", "a\0b", "A", "yes", "x|y", "[1]"]),
    st.text(string.printable, max_size=30),
)


@given(content=st.binary(max_size=300), suffix=st.sampled_from(SUFFIXES), with_header=st.booleans())
@example(content=b"\xef\xbb\xbf" + HEADER.encode(), suffix="csv", with_header=False)
@example(content=b'"a.png', suffix="csv", with_header=True)
@example(content=b"[" * 100_000, suffix="jsonl", with_header=False)
@example(content=b'{"image": ' + b"9" * 5000 + b"}", suffix="jsonl", with_header=False)
@example(content=b'{"image": "a.png", "question": "\\ud800?", "answer": 1}', suffix="jsonl", with_header=False)
@settings(max_examples=100, deadline=None)
def test_random_bytes(scratch: Path, content: bytes, suffix: str, with_header: bool) -> None:
    check(scratch, f"test.{suffix}", HEADER.encode() * with_header + content)


@given(
    rows=st.lists(st.lists(CELLS, max_size=6), max_size=8),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
@settings(max_examples=80, deadline=None)
def test_ragged_rows_in_any_encoding(scratch: Path, rows: list[list[str]], encoding: str, quoting: int) -> None:
    text = io.StringIO()
    writer = csv.writer(text, quoting=quoting)  # type: ignore[arg-type]
    writer.writerow(["image", "question", "answer"])
    writer.writerows(rows)
    content = text.getvalue().encode(encoding, "replace")
    check(scratch, "test.csv", content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | CELLS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELLS, inner, max_size=3),
    max_leaves=6,
)
COLUMN = st.sampled_from(["image", "images", "question", "answer", "options", "answer_type", "id", "split", "patient"])


@given(rows=st.lists(st.dictionaries(COLUMN, JSON, max_size=8), max_size=6))
@settings(max_examples=80, deadline=None)
def test_any_json(scratch: Path, rows: list[dict[str, object]]) -> None:
    content = "\n".join(map(json.dumps, rows)).encode()
    check(scratch, "test.jsonl", content)


KINDS: dict[str, tuple[str, str, dict[str, object]]] = {
    "pmc_vqa": (
        "test.csv",
        "images",
        dict(zip(("Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D"), "qqqabcd"))
        | {"Answer_label": "A"},
    ),
    "slake_en": (
        "test.json",
        "imgs",
        {"img_name": "a.png", "question": "q", "answer": "yes", "q_lang": "en", "answer_type": "OPEN", "qid": 1},
    ),
    "vqa_rad": (
        FILE,
        "images",
        dict.fromkeys(REQUIRED, "x")
        | {"image_name": "a.png", "answer_type": "OPEN", "phrase_type": "test_para", "answer": "no"},
    ),
    "omnimed": (
        "test.json",
        ".",
        {
            "question_id": "1",
            "question": "q",
            "option_A": "a",
            "option_B": "b",
            "gt_answer": "a",
            "image_path": "a.png",
        },
    ),
    "vqa_med": (
        "VQAMed2019_Test_Questions_w_Ref_Answers.txt",
        "VQAMed2019_Test_Images",
        dict.fromkeys(("image", "category", "question", "answer"), "x"),
    ),
}


@given(data=st.data(), name=st.sampled_from(sorted(KINDS)))
@settings(max_examples=100, deadline=None)
def test_every_loader_survives_any_values(scratch: Path, data: st.DataObject, name: str) -> None:
    file, images, good = KINDS[name]
    values = CELLS | st.sampled_from(["a.png", "b.png", "../a.png", "A", "B", "yes", "a#b", "A: x", '"A: x'])
    rows = [good]
    for _ in range(data.draw(st.integers(0, 4))):
        changed = data.draw(st.dictionaries(st.sampled_from(sorted(good)), values if name in TEXT else JSON | values))
        rows.append({**good, **changed})
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=120))
    elif name == "pmc_vqa":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(good))
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode("utf-8", "replace")
    elif name == "vqa_med":
        content = "\n".join("|".join(map(str, row.values())) for row in rows).encode("utf-8", "replace")
    else:
        content = json.dumps(rows).encode()
    root = scratch / name
    if not root.exists():
        (root / images).mkdir(parents=True)
        for image in ("a.png", "q", "x.jpg"):
            Image.new("L", (2, 2)).save(root / images / image, "PNG")
    (root / file).write_bytes(content)
    try:
        dataset = load_dataset(DataConfig(name=name, path=str(root), max_dropped=1.0), "test")  # type: ignore[arg-type]
    except ValueError as error:
        assert file in str(error) or "No question is left" in str(error)
        return
    assert isinstance(dataset, StoredDataset) and dataset.fingerprint
    assert all(issue.file == file and issue.reason and issue.detail.isprintable() for issue in dataset.issues)
    for sample in dataset.samples:
        assert is_correct(sample, parse_completion(render_answer("seen", sample.answer)).answer), sample


TEXT = ("pmc_vqa", "vqa_med")
"""Data sets whose tables hold text only."""


@given(name=st.text(max_size=30) | st.text("./\\a", max_size=12))
@example(name="../secret")
@example(name="a/../../secret")
@example(name="/secret")
@settings(max_examples=100, deadline=None)
def test_no_name_leaves_the_folder(scratch: Path, name: str) -> None:
    root = scratch / "names"
    if not root.exists():
        (root / "images" / "a").mkdir(parents=True)
        (root / "secret").write_bytes(b"x")
        (root / "images" / "a" / "aa").write_bytes(b"x")
    images = ImageFolder(root / "images")
    path, problem = images.find(name)
    assert problem or (root / "images" / path).resolve().is_relative_to((root / "images").resolve())
    if name.startswith("/") or ".." in name.split("/"):
        assert problem == OUTSIDE
    assert images.find("a//aa") == ("a/aa", "") and images.find("b")[1] == MISSING


# --- single faults ------------------------------------------------------------------------------------------------


def test_csv_rows_are_numbered_and_issues_reported(tmp_path: Path) -> None:
    content = (
        b"\xef\xbb\xbfimage,question,answer\r\n"
        b"a,b,c\r\n"
        b"\r\n"
        b"too,few\r\n"
        b'1,"two\nlines",3\r\n'
        b"1,Sj\xf6gren,3\r\n"
        b"1,\xc3\xa9,3\r\n"
        b'1,"quote"d,3\r\n'
        b"x,y,z\r\n" + b"1," + b"g" * 200_000 + b",3\r\n"
        b"1,2,3,4\r\n"
        b'last,"never closed\r\n'
    )
    rows, report = read(tmp_path / "t.csv", content)
    assert [(number, fields["question"]) for number, fields in rows] == [
        (0, "b"),
        (2, "two\nlines"),
        (3, "Sjögren"),
        (4, "é"),
        (6, "y"),
    ]
    assert [(issue.row, issue.reason) for issue in report.issues] == [
        (1, "wrong number of cells"),
        (3, WINDOWS_1252),
        (5, "broken quotation or endless cell"),
        (7, "broken quotation or endless cell"),
        (8, "wrong number of cells"),
        (9, "broken quotation or endless cell"),
    ]
    assert report.issues[0].detail == "line 4: 2 where the header has 3"
    assert report.total == 10 and {issue.file for issue in report.issues} == {"t.csv"}


def test_json_lines_are_numbered_and_issues_reported(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n[1]\n{"a": "\xf6"}\n{"a": NaN}\n' + b"[" * 200_000 + b"\n"
    rows, report = read(tmp_path / "t.jsonl", content)
    assert [(number, str(fields["a"])) for number, fields in rows] == [(0, "1"), (3, "ö"), (4, "nan")]
    assert [(issue.row, issue.reason) for issue in report.issues] == [
        (1, "not JSON"),
        (2, "not a JSON object"),
        (3, WINDOWS_1252),
        (5, "not JSON"),
    ]
    assert report.issues[0].detail.startswith("line 3: ") and report.total == 6


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"", "has no header"),
        ("t.csv", b"\n1,2\n", "has no header"),
        ("t.csv", b"a,b,a\n1,2,3\n", "has the column a twice"),
        ("t.csv", b'"a\n', "is not CSV"),
        ("t.csv", "a,b\n1,2\n".encode("utf-16"), "is UTF-16 or UTF-32"),
        ("t.jsonl", "{}".encode("utf-16"), "is UTF-16 or UTF-32"),
        ("t.json", b"[{", "is not JSON"),
        ("t.json", b"[" * 100_000, "nested too deeply"),
        ("t.json", b"{}", "is not a list of questions"),
        ("t.parquet", b"PAR1", "is not parquet, or damaged"),
        ("t.json", b'{"a": [1], "b": [2]}', "holds 2 lists (a, b)"),
        ("t.xls", b"", "convert it to one of .csv, .tsv, .xlsx, .jsonl, .json, .parquet"),
        ("t.txt", b"a|b\n", "convert it to one of .csv, .tsv, .xlsx, .jsonl, .json, .parquet"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match="t\\.") as error:
        read(tmp_path / name, content)
    assert sentence in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_folder_instead_of_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(ValueError, match=r"t\.csv cannot be read \(Is a directory\)"):
        list(read_table(tmp_path / "t.csv", TableReport("t.csv")))
