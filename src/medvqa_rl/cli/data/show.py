"""The verbs ``data list`` and ``data show``. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from medvqa_rl.config import Config
from medvqa_rl.core.progress import open_console
from medvqa_rl.core.types import Dataset, Sample
from medvqa_rl.data import Split, load_dataset
from medvqa_rl.data.images.sheet import caption_lettering, draw_sheet, save_sheet
from medvqa_rl.data.sets.catalogue import ENTRIES
from medvqa_rl.data.splits import choose


def run_list() -> None:
    """Print the supported data sets."""
    out = open_console()
    for entry in ENTRIES:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim", min_width=8)
        table.add_column(overflow="fold")
        for label, value in (
            ("splits", entry.splits),
            ("columns", entry.columns),
            ("terms", entry.terms),
            ("from", entry.source),
        ):
            table.add_row(label, Text(value))
        out.print(Text.assemble((entry.name, "bold"), "  ", entry.what))
        out.print(table)
        out.print()
    out.print("Set data.name to one of these names; docs/data.md describes the folder each expects.", soft_wrap=True)


def run_show(config: Config, *, split: Split, count: int, output: Path) -> None:
    """Draw a contact sheet of a random subset of a split, chosen by ``data.seed``.

    Raises:
        ValueError: the data cannot be found or read.
    """
    samples = _subset(load_dataset(config.data, split), count, config.data.seed)
    out = open_console()
    out.print(f"Written: {save_sheet(draw_sheet(samples), output)}", soft_wrap=True)
    if notice := caption_lettering(samples).notice():
        out.print(notice, soft_wrap=True)


def _subset(dataset: Dataset, count: int, seed: int) -> list[Sample]:
    """A random subset in the order of the data set, or the first samples of an endless one."""
    if dataset.is_endless:
        return [dataset[index] for index in range(count)]
    return [dataset[index] for index in choose([str(index) for index in range(len(dataset))], count, seed)]
