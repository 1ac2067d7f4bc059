"""Tables of text that fit the terminal, and as Markdown and CSV. Imports no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from medvqa_rl.core.text import as_markdown_text

Cell = str | Text

LONGEST_WORD = 24
"""Width in characters from which a word of prose, such as a path, may be broken."""


@dataclass(frozen=True)
class TextTable:
    """A table whose columns follow the width of the terminal; numbers are never cut or wrapped.

    Prose wraps between words. If the columns do not fit, those in ``drop`` are left out one by one, in that order, and
    named below the table. If the others do not fit either, each row becomes a block of lines.
    """

    title: str
    header: Sequence[str]
    """Titles of the columns, all different. The first column names the row."""
    rows: Sequence[Sequence[Cell]]
    drop: Sequence[str] = ()
    """Columns that may be left out, the least important first."""
    prose: Collection[str] = ()
    """Columns that may wrap, besides the first."""
    notes: Sequence[str] = ()
    """Lines below the table."""
    rules: Collection[int] = ()
    """Rows above which a line is drawn."""
    bold: Collection[int] = ()
    """Rows in bold."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="italic")
        yield from self._body(options.max_width)
        yield from (Text(note, style="dim") for note in self.notes)

    def _body(self, width: int) -> Iterable[RenderableType]:
        for left_out in range(len(self.drop) + 1):
            dropped = set(self.drop[:left_out])
            kept = [index for index, title in enumerate(self.header) if title not in dropped]
            if widths := self._widths(kept, width):
                yield self._table(kept, widths)
                if dropped:
                    names = ", ".join(title for title in self.header if title in dropped)
                    yield Text(f"Columns that need a wider terminal: {names}", style="dim")
                return
        yield from self._blocks()

    def _widths(self, kept: Sequence[int], width: int) -> list[int]:
        """Widths of the columns that are kept, within ``width`` characters with their borders; empty if too wide."""
        widths, least = [], []
        for index in kept:
            title, cells = self.header[index], [str(row[index]) for row in self.rows]
            content = max((cell_len(line) for cell in cells for line in cell.splitlines()), default=0)
            widths.append(max(cell_len(title), content))
            words = [cell_len(word) for cell in (title, *cells) for word in cell.split()]
            if index == 0 or title in self.prose:
                least.append(min(LONGEST_WORD, max(words, default=0)))
            else:
                least.append(max(content, *map(cell_len, title.split()), 0))
        excess = sum(widths) + 3 * len(kept) + 1 - width
        if excess > sum(widths) - sum(least):
            return []
        for _ in range(excess):  # the widest column that can, gives
            widest = max(range(len(kept)), key=lambda place: (widths[place] > least[place], widths[place]))
            widths[widest] -= 1
        return widths

    def _table(self, kept: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table()
        for index, width in zip(kept, widths):
            is_prose = index == 0 or self.header[index] in self.prose
            table.add_column(
                Text(self.header[index]), justify="left" if is_prose else "right", overflow="fold", width=width
            )
        for number, row in enumerate(self.rows):
            if number in self.rules:
                table.add_section()
            cells = [cell if isinstance(cell, Text) else Text(cell) for cell in (row[index] for index in kept)]
            table.add_row(*cells, style="bold" if number in self.bold else None)
        return table

    def _blocks(self) -> Iterable[RenderableType]:
        """Each row as its name and a line per column."""
        for row in self.rows:
            if name := str(row[0]):
                yield Text(name, style="bold")
            for title, cell in list(zip(self.header, row))[1:]:
                if str(cell):
                    yield Padding(Text.assemble((f"{title}: ", "dim"), cell), (0, 0, 0, 2), expand=False)

    def markdown(self) -> str:
        """Heading and table, with all columns."""
        return f"## {as_markdown_text(self.title)}\n\n" + as_markdown(self.header, self.rows).removesuffix("\n")


def as_markdown(titles: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Format a table as Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    cells = ([as_markdown_text(str(cell)).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def as_csv(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([titles, *rows])
    return text.getvalue()
