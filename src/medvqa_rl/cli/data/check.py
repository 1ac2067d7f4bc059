"""The verb ``data check``, and how its findings are printed. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from medvqa_rl.config import Config, DataConfig
from medvqa_rl.core.progress import open_console, progress_bars
from medvqa_rl.core.tables import TextTable
from medvqa_rl.data.check import ENDLESS_LIMIT, check_data, load_with_further, official_overlap
from medvqa_rl.data.findings import FAULTS, DataReport, SplitFacts
from medvqa_rl.data.images.fingerprints import BITS, NEAR
from medvqa_rl.data.reading.issues import count_issues
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.evaluation.pass_rates import histogram, read_pass_rates

SHOWN = 3
"""Examples of a finding in the table; all faulty samples and images are listed below it."""


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
    """Check all splits, print the findings and optionally write them as an HTML page.

    Args:
        limit: maximum number of samples to check per split.
        decode: decode the images.
        strict: fail on warnings too.
        html: path of the HTML page.
        workers: decoding threads; defaults to one per CPU, at most 8.
        further: data sets that must not share images with this one, such as those of an evaluation.

    Returns:
        Whether the check passed.

    Raises:
        ValueError: the data cannot be found or read.
    """
    from medvqa_rl.models.families.costs import image_rule

    cost, where = image_rule(config.model)
    out = open_console()
    datasets = load_with_further(config.data, further)
    rates = [] if config.data.pass_rate_from is None else read_pass_rates(datasets["train"], config.data)
    for sentence in dict.fromkeys(s for d in datasets.values() if isinstance(d, StoredDataset) for s in d.about):
        out.print(sentence, soft_wrap=True, markup=False, highlight=False)
    with progress_bars() as progress:
        report = check_data(
            datasets,
            cost=cost,
            template=config.prompt.template,
            wording=config.prompt.wording,
            limit=limit,
            decode=decode,
            workers=workers or min(8, os.cpu_count() or 1),
            progress=progress,
        )
    if config.data.split == "image" and config.data.name != "own":
        report = replace(report, notes={**report.notes, **official_overlap(config.data)})
    print_report(report, out, where)
    if rates:
        out.print()
        out.print(pass_rate_table(rates, config.data))
    if html is not None:
        from medvqa_rl.report.pages.data_page import write_data_page

        out.print(f"Written: {write_data_page(html, report, where)}", soft_wrap=True)
    return not report.is_wrong(strict=strict)


def pass_rate_table(rates: Sequence[float | None], data: DataConfig) -> TextTable:
    """The histogram of the pass rates of the training questions, and which of them ``data.pass_rate`` keeps."""
    low, high = data.pass_rate or (0.0, 1.0)
    kept = sum(rate is not None and low <= rate <= high for rate in rates)
    rows = histogram(rates)
    most = max(count for _, count in rows)
    cells = [(label, f"{n:,}", f"{100 * n / len(rates):.1f} %", "#" * -(-30 * n // most)) for label, n in rows]
    note = f"data.pass_rate [{low:g}, {high:g}] keeps {kept:,} of {len(rates):,} questions."
    header = ["pass rate", "questions", "share", ""]
    return TextTable("Pass rates of the training questions", header, cells, prose=[""], notes=[note])


def _spread(values: Sequence[int]) -> str:
    """Median and range."""
    if not values:
        return "–"
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def _majority(answer: str, share: float) -> str:
    """The most frequent gold answer and its share."""
    return f"{answer} {100 * share:.1f} %" if answer else "–"


def print_report(report: DataReport, out: Console, where: str) -> None:
    """Print the report: a table of the splits, notes from loading, the findings, and the verdict.

    Args:
        where: source of the image limits, as from :func:`image_rule`.
    """
    rows: dict[str, Callable[[SplitFacts], str]] = {
        "questions": lambda split: f"{split.num_rows:,}" if split.num_rows else "endless",
        "checked": lambda split: f"{split.seen:,}",
        "images": lambda split: f"{len(split.images):,}",
        "answer types": lambda split: ", ".join(f"{n:,} {kind}" for kind, n in split.types.most_common()),
        "majority letter": lambda split: _majority(*split.majority_letter),
        "majority closed answer": lambda split: _majority(*split.majority_answer),
        "words per question": lambda split: _spread(split.question_words),
        "words per answer": lambda split: _spread(split.answer_words),
        "image width": lambda split: _spread(split.widths),
        "image height": lambda split: _spread(split.heights),
        "image area": lambda split: _spread([w * h for w, h in zip(split.widths, split.heights)]),
        "image tokens per question": lambda split: _spread(split.image_tokens),
        "fingerprint": lambda split: split.fingerprint,
    }
    header = ["", *(split.split for split in report.splits)]
    cells = [(label, *map(cell, report.splits)) for label, cell in rows.items()]
    out.print(TextTable("Splits", header, cells, prose=header))
    out.print(
        f"Medians, with ranges in parentheses. {report.cost.rule} ({where}).",
        style="dim",
        soft_wrap=True,
    )
    if any(not split.num_rows for split in report.splits):
        out.print(
            f"Endless splits: the first {ENDLESS_LIMIT:,} samples are checked unless --limit is set.", style="dim"
        )
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
        for finding in report.findings:
            if finding.level == "wrong" and finding.what in FAULTS and finding.count > SHOWN:
                more = finding.count - len(finding.examples)
                lines = [*finding.examples, *([f"and {more:,} more"] if more > 0 else [])]
                out.print("\n  ".join([f"{finding.what}:", *lines]), soft_wrap=True, markup=False, highlight=False)
        if any(overlap.count("hash") for overlap in report.overlaps):
            out.print(
                f"Near duplicates: images whose perceptual hashes differ in at most {NEAR} of {BITS} bits.",
                style="dim",
                soft_wrap=True,
            )
    out.print()
    wrong = sum(finding.level == "wrong" for finding in report.findings)
    verdict = f"{wrong} kinds of faults" if wrong > 1 else "1 kind of fault" if wrong else "Nothing is wrong"
    rest = len(report.findings) - wrong
    out.print(f"{verdict}{f', {rest} to review' if rest else ''}. {report.seconds:.1f} s.", style="bold")


def _findings(report: DataReport) -> TextTable:
    rows = []
    for finding in report.findings:
        shown = [text if len(text) <= 90 else text[:87] + "..." for text in finding.examples[:SHOWN]]
        more = "..." if finding.examples and finding.count > len(shown) else ""
        rows.append(
            (
                Text(finding.level, style="bold red" if finding.level == "wrong" else "yellow"),
                finding.what,
                f"{finding.count:,}",
                finding.text,
                "\n".join([*shown, *([more] if more else [])]),
            )
        )
    header = ("", "finding", "count", "meaning", "examples")
    return TextTable("Findings", header, rows, prose=("finding", "meaning", "examples"), rules=range(1, len(rows)))
