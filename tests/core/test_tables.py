"""Tables at every width of the terminal."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from medvqa_rl.core.progress import PIPED_WIDTH, open_console
from medvqa_rl.core.tables import LONGEST_WORD, TextTable, as_csv, as_markdown

TABLE = TextTable(
    "Accuracy",
    ("run", "questions", "images", "accuracy", "95 % interval"),
    [("before the run", "1,000", "500", "61.4", "58.1 to 64.6"), ("after", "1,000", "500", "70.2", "67.0 to 73.3")],
    drop=("images", "questions"),
    notes=["Intervals resample images."],
    bold={0},
    rules={1},
)


def show(table: TextTable, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_wide_terminal_shows_every_column_on_one_line_each() -> None:
    title, top, header, _, first, rule, second, _, note = show(TABLE, 120)
    assert title == "Accuracy" and note == "Intervals resample images." and rule.startswith("├")
    assert header.split("┃")[1:-1] == [
        *(" run            ", " questions ", " images ", " accuracy ", " 95 % interval "),
    ]
    assert first.split("│")[1:-1] == [
        *(" before the run ", "     1,000 ", "    500 ", "     61.4 ", "  58.1 to 64.6 "),
    ]
    assert "after" in second and len(top) < 120


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(66, None), (57, None), (56, "images"), (48, "images"), (47, "questions, images"), (36, "questions, images")],
)
def test_columns_are_left_out_in_their_order(width: int, left_out: str | None) -> None:
    lines = show(TABLE, width)
    assert all(cell_len(line) <= width for line in lines)
    text = " ".join(" ".join(lines).split())
    assert text.count("58.1 to 64.6") == text.count("67.0 to 73.3") == 1
    assert ("500" in text) is (left_out is None)
    assert (f"Columns that need a wider terminal: {left_out}" in text) is (left_out is not None)


def test_where_no_table_fits_each_row_is_a_block() -> None:
    assert show(TABLE, 20)[:12] == [
        *("Accuracy", "before the run"),
        *("  questions: 1,000", "  images: 500", "  accuracy: 61.4", "  95 % interval:"),
        *("  58.1 to 64.6", "after"),
        *("  questions: 1,000", "  images: 500", "  accuracy: 70.2", "  95 % interval:"),
    ]


WORDS = st.text(alphabet="abcxyz", min_size=1, max_size=LONGEST_WORD)
NUMBERS = st.floats(-1e4, 1e4).map(lambda value: f"{value:,.2f}")


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.lists(WORDS, min_size=1, max_size=5).map(" ".join), NUMBERS, NUMBERS, NUMBERS),
        min_size=1,
        max_size=4,
    ),
    width=st.sampled_from([60, 80, 100, 120, PIPED_WIDTH]),
)
def test_neither_a_number_nor_a_word_is_ever_cut(rows: list[tuple[str, str, str, str]], width: int) -> None:
    table = TextTable("", ("name", "first number", "second", "third"), rows, drop=("second",))
    lines = show(table, width)
    assert all(cell_len(line) <= width for line in lines)
    words = " ".join(lines).split()
    for name, *numbers in rows:
        assert set(name.split()) <= set(words)
        assert {numbers[0], numbers[2]} <= set(words)
    if width == PIPED_WIDTH:
        assert all(any(row[0] in line and row[2] in line for line in lines) for row in rows)


def test_output_to_a_file_never_wraps(capsys: pytest.CaptureFixture[str]) -> None:
    console = open_console()
    console.print(TABLE)
    console.print("word " * 200)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and max(map(len, lines)) < 1001


def test_cells_of_markdown_are_text() -> None:
    rows = [("<script>alert(1)</script>", "![x](http://a.example) < 0.001 [0.1, 0.2]")]
    table = TextTable("<b> [x](y)", ("a", "b"), rows).markdown()
    assert table.startswith("## \\<b> [x]\\(y)\n")
    assert "| \\<script>alert(1)\\</script> | ![x]\\(http://a.example) < 0.001 [0.1, 0.2] |" in table


def test_markdown_and_csv_hold_every_column() -> None:
    assert as_markdown(("a", "b"), [("x | y", Text("1\n2"))]) == "| a | b |\n| --- | --- |\n| x \\| y | 1 2 |\n"
    assert as_csv(("a", "b"), [("x, y", 1)]) == 'a,b\n"x, y",1\n'
    assert TABLE.markdown().startswith("## Accuracy\n\n| run | questions | images | accuracy | 95 % interval |\n")
