"""The questions of a new project: read, checked row by row, and split. Imports no torch."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.progress import progress_bar
from medvqa_rl.core.text import for_terminal, normalise, printable, shown
from medvqa_rl.core.types import Dataset, Sample
from medvqa_rl.data import load_splits
from medvqa_rl.data.division import COLUMN, Division, Whole, choose_column, divide, equal_images, read_whole
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.tables import is_saved
from medvqa_rl.data.reading.unpack import unpacked_images
from medvqa_rl.data.sets.own import read_own
from medvqa_rl.data.splits import SPLITS

MIN_SAMPLES = 50
"""With fewer questions nothing can be learned or measured: ten test questions have an interval of 60 points."""


def check_table(table: Path) -> None:
    """Refuse a table that is not there.

    Raises:
        ValueError: it is not, or is a folder that is no table.
    """
    if table.is_file() or is_saved(table):
        return
    if splits := sorted(path.parent.name for path in table.glob("*/state.json")):
        raise ValueError(
            f"The folder {table} holds the splits {', '.join(splits)}: give one of them, such as "
            f"{table / splits[-1]}, or use all as they are with data.name=own data.path={shlex.quote(str(table))}."
        )
    what = "is a folder that save_to_disk did not write" if table.is_dir() else "does not exist"
    raise ValueError(
        f"The table {table} {what}: give your questions as CSV, Excel, JSON Lines, JSON or parquet, or a folder "
        "written by save_to_disk."
    )


def load_staged(data: DataConfig, staged: Path, table: Path) -> Mapping[str, Dataset]:
    """Load the splits of the copy in the temporary folder; errors name the user's table instead.

    Raises:
        ValueError: the table cannot be used.
    """
    try:
        return load_splits(data)
    except ValueError as error:
        text = str(error)
        for shown, given in ((staged, table), (staged.parent, table.parent), (staged.name, table.name)):
            text = text.replace(str(shown), str(given))
        raise ValueError(text) from error


def read_checked(
    table: Path, images: Path | None, columns: Mapping[str, str], cache_dir: Path, *, allow_text_only: bool
) -> tuple[Whole, list[tuple[str, ...]]]:
    """Read the table, every row as training will, and decode every image.

    Returns:
        The usable rows, with the unusable ones listed, and groups of image names with equal pixels.

    Raises:
        ValueError: the table cannot be read.
    """
    folder = unpacked_images(cache_dir, "own") if images is None else images
    whole = read_whole(table, folder, columns, cache_dir, allow_text_only=allow_text_only)
    reading = read_own(
        table,
        ImageFolder(folder),
        split="",
        needs_split=False,
        given=columns,
        unpacks=images is None,
        allow_text_only=allow_text_only,
    )
    dropped = [issue for issue in reading.issues if issue.action == "dropped"]
    whole = whole.without({issue.number: (issue.reason, printable(issue.detail, 60)) for issue in dropped})
    whole = replace(whole, about=" ".join(reading.about))
    with progress_bar("images") as progress:
        return equal_images(whole, folder, workers=min(8, os.cpu_count() or 1), progress=progress)


def split_table(whole: Whole, equal: Sequence[tuple[str, ...]], seed: int) -> Division:
    """Split the table, or keep its own split if it has one.

    No image is in two splits, even under two names, and no patient if a column names them.

    Args:
        equal: groups of image names with equal pixels.

    Raises:
        ValueError: a row lacks its patient, the table's own split is incomplete, or there are too few groups.
    """
    own = [str(entry.fields.get(COLUMN) or "").strip() for entry in whole.entries]
    if any(own):
        bad = next((place for place, value in enumerate(own) if value not in SPLITS), None)
        missing = [place for place in SPLITS if place not in own]
        if bad is not None or missing:
            what = (
                f"has no row for {missing[0]}"
                if bad is None
                else f"is {shown(own[bad])} in row {whole.entries[bad].number}"
            )
            raise ValueError(
                f"The column {COLUMN} of {whole.path} {what}: give train, val or test in every row and use all three, "
                "or remove the column to have the questions split for you."
            )
        return Division(tuple(entry.row for entry in whole.entries), tuple(own), 0)  # type: ignore[arg-type]
    by, warning = choose_column([entry.fields for entry in whole.entries])
    print(for_terminal(warning or f"Rows with the same {by} stay in one split."))
    return divide(whole, by=by, val=0.1, test=0.2, seed=seed, equal=equal)


def find_obstacles(samples: Sequence[Sample], table: Path, open_correctness: str | None) -> list[str]:
    """Return a sentence for each reason why nothing can be learned from the questions."""
    problems = []
    if len(samples) < MIN_SAMPLES:
        problems.append(
            f"{table} has {len(samples)} usable questions, but training and testing need at least "
            f"{MIN_SAMPLES}: collect more (500 to 1,000 are usual for LoRA)."
        )
    answers = Counter(normalise(sample.answer_text) for sample in samples)
    letters = Counter(sample.answer for sample in samples if sample.answer_type == "choice")
    if len(answers) == 1:
        (answer,) = answers
        problems.append(
            f"All {len(samples)} answers in {table} are {shown(answer)}, so always giving that answer is always right "
            "and there is nothing to learn: add questions with other answers."
        )
    elif len(letters) == 1 and letters.total() == len(samples):
        (letter,) = letters
        problems.append(
            f"The right option in {table} is always {letter}, so always answering {letter} is always "
            "right and there is nothing to learn: shuffle the options."
        )
    if open_correctness is None and all(sample.answer_type == "open" for sample in samples):
        problems.append(
            f"All questions in {table} are open-ended, and by default an open-ended answer must match the gold answer "
            "exactly: add a column with options, or choose how answers are scored with --open-correctness token_f1, "
            "similarity or judge (exact keeps the default)."
        )
    return problems
