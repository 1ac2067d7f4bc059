"""What the verbs ``data list``, ``check`` and ``show`` do. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medvqa_rl.config import Config, DataConfig
from medvqa_rl.core.progress import progress_bars
from medvqa_rl.core.types import Dataset, Sample
from medvqa_rl.data import Split, load_dataset
from medvqa_rl.data.check import ENDLESS_LIMIT, check_data, owners_split, with_further
from medvqa_rl.data.findings import DataReport
from medvqa_rl.data.images.budget import image_budget
from medvqa_rl.data.images.fingerprints import NEAR
from medvqa_rl.data.images.sheet import draw_sheet, save_sheet
from medvqa_rl.data.reading.issues import count_issues
from medvqa_rl.data.sets.catalogue import readable
from medvqa_rl.data.splits import choose


def console() -> Console:
    """The terminal, or a file wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def run_list() -> None:
    """Print the data sets that can be read."""
    out = console()
    for entry in readable():
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title_justify="left")
        table.add_column(style="dim", min_width=8)
        table.add_column(overflow="fold")
        for name, value in (
            ("splits", entry.splits),
            ("columns", entry.columns),
            ("terms", entry.terms),
            ("from", entry.source),
        ):
            table.add_row(name, Text(value))
        out.print(Text.assemble((entry.name, "bold"), "  ", entry.what))
        out.print(table)
        out.print()
    out.print("Set data.name to one of these; docs/data.md says how each folder looks.", soft_wrap=True)


def run_check(
    config: Config,
    *,
    limit: int | None,
    decode: bool,
    strict: bool,
    html: Path | None,
    workers: int | None = None,
    further: Sequence[DataConfig] = (),
) -> bool:
    """Check all splits, print the findings and, if asked, write a page.

    Args:
        limit: samples per split to look at.
        decode: decode the images.
        strict: what is only to be looked at counts as wrong.
        html: file of the page.
        workers: threads that decode; None is one per processor, at most 8.
        further: data sets that shall share no image with this one, such as those of an evaluation.

    Returns:
        Whether all is right.

    Raises:
        ValueError: the data cannot be found or read.
    """
    budget, where = image_budget(config.model)
    datasets = with_further(config, further)
    threads = workers or min(8, os.cpu_count() or 1)
    with progress_bars() as progress:
        report = check_data(
            datasets,
            budget=budget,
            template=config.prompt.template,
            limit=limit,
            decode=decode,
            workers=threads,
            progress=progress,
        )
    if config.data.split == "image" and config.data.name != "own":
        report = replace(report, notes={**report.notes, **owners_split(config)})
    out = console()
    print_report(report, out, where)
    if html is not None:
        from medvqa_rl.report.pages.data_page import write_data_page

        out.print(f"Written: {write_data_page(html, report, where)}", soft_wrap=True)
    return not report.is_wrong(strict=strict)


def _spread(values: Sequence[int]) -> str:
    """Median and range."""
    if not len(values):
        return "–"
    low, middle, high = np.quantile(np.asarray(values), [0, 0.5, 1])
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def _answer(found: tuple[str, float]) -> str:
    return f"{found[0]} {100 * found[1]:.1f} %" if found[0] else "–"


def print_report(report: DataReport, out: Console, where: str) -> None:
    """Print what was found as tables: the splits, then what is wrong, then what loading did."""
    table = Table(title="Splits", title_justify="left", title_style="bold")
    table.add_column("")
    for split in report.splits:
        table.add_column(split.split, justify="right")
    pixels = [[w * h for w, h in zip(split.widths, split.heights)] for split in report.splits]
    cells: Mapping[str, list[str]] = {
        "questions": [f"{split.num_rows:,}" if split.num_rows else "endless" for split in report.splits],
        "looked at": [f"{split.seen:,}" for split in report.splits],
        "images": [f"{len(split.images):,}" for split in report.splits],
        "answer types": [
            ", ".join(f"{n:,} {kind}" for kind, n in split.types.most_common()) for split in report.splits
        ],
        "always the same letter scores": [_answer(split.majority_letter) for split in report.splits],
        "always the same closed answer scores": [_answer(split.majority_answer) for split in report.splits],
        "words of a question": [_spread(split.question_words) for split in report.splits],
        "words of an answer": [_spread(split.answer_words) for split in report.splits],
        "image width": [_spread(split.widths) for split in report.splits],
        "image height": [_spread(split.heights) for split in report.splits],
        "image area": [_spread(area) for area in pixels],
        "image tokens of a question": [_spread(split.image_tokens) for split in report.splits],
        "fingerprint": [split.fingerprint for split in report.splits],
    }
    for name, values in cells.items():
        table.add_row(name, *values)
    out.print(table)
    budget = report.budget
    out.print(
        f"Medians, with the range in brackets. Image tokens {where}: {budget.min_pixels:,} to {budget.max_pixels:,} "
        f"pixels, one token per {budget.patch_size * budget.merge_size} x {budget.patch_size * budget.merge_size}.",
        style="dim",
        soft_wrap=True,
    )
    if any(not split.num_rows for split in report.splits):
        out.print(f"Of endless splits {ENDLESS_LIMIT:,} samples are looked at unless --limit says more.", style="dim")
    out.print()
    if report.leaked is not None:
        leaked, total = report.leaked
        out.print(f"{leaked:,} of the {total:,} test images are also in train or val.", style="bold" if leaked else "")
    for note, count in report.notes.items():
        out.print(f"{note}: {count:,}", markup=False)
    for what, count in count_issues(report.issues).items():
        out.print(f"rows {what}: {count:,}", markup=False)
    if report.findings:
        out.print()
        out.print(_findings(report))
        if any(finding.what.startswith("look-alikes") for finding in report.findings):
            out.print(
                f"Look-alikes: perceptual hashes that differ in at most {NEAR} of 255 bits.",
                style="dim",
                soft_wrap=True,
            )
    out.print()
    wrong = sum(finding.level == "wrong" for finding in report.findings)
    verdict = f"{wrong} kinds of faults" if wrong > 1 else "1 kind of fault" if wrong else "Nothing is wrong"
    rest = len(report.findings) - wrong
    out.print(f"{verdict}{f', {rest} to look at' if rest else ''}. {report.seconds:.1f} s.", style="bold")


def _findings(report: DataReport) -> Table:
    table = Table(title="Findings", title_justify="left", title_style="bold", show_lines=True)
    table.add_column("")
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("meaning", overflow="fold", ratio=3)
    table.add_column("such as", overflow="fold", ratio=2)
    for finding in report.findings:
        shown = [text if len(text) <= 90 else text[:87] + "..." for text in finding.examples[:3]]
        more = "..." if finding.examples and finding.count > len(shown) else ""
        table.add_row(
            Text(finding.level, style="bold red" if finding.level == "wrong" else "yellow"),
            Text(finding.what),
            f"{finding.count:,}",
            Text(finding.text),
            Text("\n".join([*shown, *([more] if more else [])])),
        )
    return table


def run_show(config: Config, *, split: Split, count: int, output: Path) -> None:
    """Draw a contact sheet of a seeded choice of samples.

    Raises:
        ValueError: the data cannot be found or read.
    """
    dataset = load_dataset(config.data, split)
    save_sheet(draw_sheet(chosen(dataset, count, config.data.seed)), output)
    console().print(f"Written: {output}", soft_wrap=True)


def chosen(dataset: Dataset, count: int, seed: int) -> list[Sample]:
    """A choice of samples by seed, in the order of the data set; the first ones of an endless one."""
    if dataset.is_endless:
        return [dataset[index] for index in range(count)]
    places = choose([str(index) for index in range(len(dataset))], count, seed)
    return [dataset[index] for index in places]
