"""CSV in any dialect and Excel workbooks give the same cells, whatever is in them.

Run: pytest tests/data/reading/test_sheets.py
"""

import csv
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medvqa_rl.data.reading.issues import TableReport
from medvqa_rl.data.reading.sheets import DELIMITERS, Fields, find_delimiter
from medvqa_rl.data.reading.tables import read_table

HEADER = ["Bild", "Frage", "Antwort"]


def read(path: Path) -> tuple[list[tuple[int, Fields]], TableReport]:
    """The rows with their numbers in the spreadsheet."""
    report = TableReport(path.name)
    return [(report.number(row), fields) for row, fields in read_table(path, report)], report


CELL = st.text(st.sampled_from("abÄ,;\t\n\"' |=."), max_size=12) | st.sampled_from(
    ['"a;b",c', "x\r\ny", "1,5", "sep=;"]
)


@given(
    rows=st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=6),
    delimiter=st.sampled_from(sorted(DELIMITERS)),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    line=st.booleans(),
)
@example(rows=[["a;b;c", "e;f;g", "h;i"]] * 3, delimiter=",", encoding="utf-8", quoting=csv.QUOTE_MINIMAL, line=False)
@example(rows=[["a,b", "e,f", "h,i"]] * 3, delimiter=";", encoding="utf-8-sig", quoting=csv.QUOTE_ALL, line=False)
@settings(max_examples=150, deadline=None)
def test_hostile_cells_survive_every_separator(
    rows: list[list[str]], delimiter: str, encoding: str, quoting: Any, line: bool, scratch: Path
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting)
    writer.writerows([HEADER, *rows])
    content = (f"sep={delimiter}\r\n" if line else "") + text.getvalue()
    path = scratch / "t.csv"
    path.write_text(content, encoding=encoding, newline="")
    found, report = read(path)
    filled = [(number, row) for number, row in enumerate(rows, start=2) if any(cell.strip() for cell in row)]
    assert found == [(number, dict(zip(HEADER, row))) for number, row in filled]
    assert report.about == f"separated by {DELIMITERS[delimiter]}" and not report.issues


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.parametrize(
    ("head", "delimiter"),
    [
        ("image,question,answer\na,b;c;d,e", ","),
        ("image;question;answer\na,b,c,d;e;f", ";"),
        ("Bild;Frage, kurz;Antwort\na;b;c\n", ";"),  # one comma each would give two cells, the others give three
        ("Bild, Frage;Antwort\na;b\nc;d\n", ";"),  # both give two cells in the header, one in the rows
        ("Bild;Frage, Antwort\na,b\nc,d\n", ","),
        ("a\tb\n1\t2\n", "\t"),
        ('"a;b",c\n"1;2",3\n', ","),
        ("image\na;b\n", ","),
        ("", ","),
        ('"never closed', ","),
    ],
)
def test_the_separator_is_that_of_header_and_rows(head: str, delimiter: str) -> None:
    assert find_delimiter(head) == delimiter


def test_rows_are_numbered_as_the_spreadsheet_does(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('sep=;\na;b;;\n1;"two\nlines";;\n\n;;;\n3;4\n5;6;7;\n8\n"9"x;0\n10;11;;;\n', encoding="utf-8")
    found, report = read(path)
    assert found == [(2, {"a": "1", "b": "two\nlines"}), (5, {"a": "3", "b": "4"}), (9, {"a": "10", "b": "11"})]
    assert [(issue.number, issue.reason) for issue in report.issues] == [
        (6, "wrong number of cells"),
        (7, "wrong number of cells"),
        (8, "broken quotation or endless cell"),
    ]


def test_windows_1252_in_the_header_and_with_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("Größe;Frage\n1;Crohn’s\n2;plain\n".encode("cp1252"))
    found, report = read(path)
    assert found == [(2, {"Größe": "1", "Frage": "Crohn’s"}), (3, {"Größe": "2", "Frage": "plain"})]
    assert [issue.number for issue in report.issues] == [2]


def workbook(path: Path, *sheets: list[list[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for number, rows in enumerate(sheets):
        sheet = book.create_sheet(f"S{number}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_the_first_sheet_of_a_workbook_is_read(tmp_path: Path) -> None:
    rows = [
        [None],
        ["Bild ", "Frage", "n", None],
        ["a.png", "Größe?\n2", 17],
        [],
        ["b.png", None, 1.5],
        ["c", "d", 1, "x"],
    ]
    found, report = read(workbook(tmp_path / "t.xlsx", [], rows, [["other"]]))
    assert found == [
        (3, {"Bild": "a.png", "Frage": "Größe?\n2", "n": 17}),
        (5, {"Bild": "b.png", "Frage": None, "n": 1.5}),
    ]
    assert report.about == "sheet 'S1' of 3" and report.total == 3
    assert [(issue.number, issue.reason) for issue in report.issues] == [(6, "cell without a header")]


def test_what_is_no_workbook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workbook(tmp_path / "t.xlsx", [["a", "b"], [1, 2]])
    content = path.read_bytes()
    for damaged in (b"", b"PK\x03\x04", content[:300], content[:-200], content.replace(b"xl/", b"yl/")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t\.xlsx is not an Excel workbook, damaged, or protected"):
            read(path)
    for rows, message in (([], "is empty"), ([["a", "a"]], "has the column a twice")):
        with pytest.raises(ValueError, match=message):
            read(workbook(path, rows))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r"needs openpyxl: install it with pip install 'medvqa-rl\[excel\]'"):
        read(path)
