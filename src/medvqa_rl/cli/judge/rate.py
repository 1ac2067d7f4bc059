"""``judge sheet`` and ``judge ratings``: make a blinded rating sheet, and summarise the ratings.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvqa_rl.core.files import write_json, write_text
from medvqa_rl.core.machine import claimed
from medvqa_rl.core.progress import open_console, print_line
from medvqa_rl.core.tables import TextTable
from medvqa_rl.core.text import number_of, size_of
from medvqa_rl.evaluation.judging.ratings import read_key, read_ratings, summarise_ratings, write_key
from medvqa_rl.evaluation.statistics.compare import Evaluated, read_evaluations
from medvqa_rl.evaluation.statistics.tables import KAPPA_NOTE, format_decimal, format_interval, format_kappa
from medvqa_rl.report.pages.images import samples_of_records
from medvqa_rl.report.pages.rating_sheet import choose_items, make_key, render_sheet


def run_sheet(
    folders: Sequence[Path], *, output: Path, questions: int, seed: int = 0, images: bool = True, replace: bool = False
) -> None:
    """Write a rating sheet and its key.

    Args:
        folders: evaluations of the same questions; the first is the baseline of differences.
        output: the sheet, an HTML file.
        questions: maximum number of questions; each gives one item per distinct answer.
        seed: for the choice of questions and the order of items.
        images: whether to embed the images in the sheet.
        replace: overwrite an existing sheet.

    Raises:
        ValueError: the evaluations, their images or the files cannot be used.
    """
    if output.suffix != ".html":
        raise ValueError(f"The sheet is an HTML file, but --output is {output}: let its name end in .html.")
    evaluations = [_single(folder) for folder in folders]
    names = [one.name for one in evaluations]
    if len(set(names)) < len(names):
        raise ValueError(f"An evaluation is given twice ({', '.join(names)}): name each folder once.")
    items = choose_items(evaluations, questions, seed)
    key = make_key(items, evaluations, seed)
    samples = samples_of_records(evaluations[0].folder, [item.record for item in items]) if images else {}
    key_path = output.with_suffix(".key.json")
    with claimed(output):
        for path in (output, key_path):
            if path.exists() and not replace:
                raise ValueError(
                    f"The file {path} exists, and ratings of its sheet need its key: choose another --output, or "
                    "overwrite both with --replace."
                )
        write_text(output, render_sheet(key, items, samples))
        write_key(key, key_path)
    asked = number_of(len({item.record.sample_id for item in items}), "question")
    print(f"Written: {output} ({number_of(len(items), 'answer')} to {asked}, {size_of(output)}).")
    print(f"Written: {key_path}. It reveals which model gave which answer: keep it from the raters.")


def _single(folder: Path) -> Evaluated:
    found = read_evaluations(folder)
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {len(found)} evaluations ({', '.join(one.name for one in found[:4])} ...): name the one "
            "whose answers are to be rated."
        )
    return found[0]


def run_ratings(key_path: Path, paths: Sequence[Path], *, output: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Read the raters' files, print the summary, and optionally write it.

    Args:
        key_path: the key of the sheet.
        paths: one file per rater.
        output: a JSON file; its tables are written beside it as Markdown.
        seed: for the bootstrap.

    Raises:
        ValueError: a file cannot be used.
    """
    key = read_key(key_path)
    results = summarise_ratings(key, [read_ratings(path, key) for path in paths], seed=seed)
    console = open_console()
    tables = rating_tables(results)
    for table in tables:
        console.print(table)
    left = [f"{row['name']} rated {row['rated']}" for row in results["raters"] if row["rated"] < results["items"]]
    for line in [*([f"Of {results['items']} items {', '.join(left)}."] if left else []), _NOTE]:
        print_line(console, line)
    if output is not None:
        found = {"sheet": key.sheet, "seed": seed, **results}
        write_json(output, found)
        write_text(
            output.with_suffix(".md"), "\n\n".join(["# Ratings", *(one.markdown() for one in tables), _NOTE]) + "\n"
        )
        print_line(console, f"Written: {output} and {output.with_suffix('.md').name}")
    return results


_NOTE = (
    "95 % intervals resample images. An item rated by several raters counts with their mean. Kappa and alpha are "
    "nominal for right and wrong, and use squared differences for reasoning; 0 is chance, 1 is full agreement. "
    + KAPPA_NOTE
)


def rating_tables(results: Mapping[str, Any]) -> list[TextTable]:
    """Tables of what :func:`medvqa_rl.evaluation.judging.ratings.summarise_ratings` returns."""
    tables = [
        TextTable(
            "Ratings",
            ("evaluation", "items", "right, %", "right by the scorer, %", "reasoning, 0 to 3"),
            [
                (
                    row["name"],
                    str(row["items"]),
                    format_interval(row["accuracy"], 100, 1),
                    format_decimal(100 * row["scorer_accuracy"], 1),
                    format_interval(row["reasoning"], 1, 2),
                )
                for row in results["evaluations"]
            ],
            drop=("right by the scorer, %", "items"),
        )
    ]
    if results["differences"]:
        tables.append(
            TextTable(
                f"Differences from {results['evaluations'][0]['name']} on the same questions",
                ("evaluation", "right, points", "reasoning"),
                [
                    (
                        row["name"],
                        format_interval(row["accuracy"], 100, 1, "+"),
                        format_interval(row["reasoning"], 1, 2, "+"),
                    )
                    for row in results["differences"]
                ],
            )
        )
    tables.append(
        TextTable(
            "Raters",
            ("rater", "rated", "cannot tell", "right, %", "reasoning"),
            [
                (
                    row["name"],
                    str(row["rated"]),
                    str(row["cannot_tell"]),
                    format_decimal(100 * row["accuracy"], 1),
                    format_decimal(row["reasoning"], 2),
                )
                for row in results["raters"]
            ],
        )
    )
    if results["agreement"] is not None:
        tables.append(
            TextTable(
                "Agreement between raters",
                ("of", "items rated by two or more", "all agree, %", "Cohen's kappa", "Krippendorff's alpha"),
                [
                    (
                        name,
                        str(row["items"]),
                        format_interval(row["same"], 100, 1),
                        format_kappa(row.get("kappa")),
                        format_interval(row["alpha"], 1, 2),
                    )
                    for name, row in results["agreement"].items()
                ],
            )
        )
    return tables
