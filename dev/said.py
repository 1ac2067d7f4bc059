"""What the answers of a PhantomVQA study say: a CSV table with a row for each arm, to standard output.

    python -m dev.said runs/studies/hacking_phantom --test unseen > docs/study/hacking/said.csv

Means over seeds, percentages of the answers unless the column names another unit. Coherent texts and flaws are those
of the oracle that reads text only; what a text claims includes false claims. The last columns are of training.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from medvqa_rl.data.phantom.claims import claims, flaws
from medvqa_rl.evaluation.records import EvalRecord, read_records
from medvqa_rl.report.runs import Row, read_run
from medvqa_rl.rewards.length import repetition_penalty
from medvqa_rl.study.signs import REPETITION

WINDOW = 10
"""Steps that are averaged for the speed of training."""

TOPICS = ("modality", "organ", "finding", "absent", "clear")
"""What a claim can be about."""


def said(records: Sequence[EvalRecord]) -> dict[str, float]:
    """Measures of the answers of one cell, by column."""
    thoughts = [record.think or "" for record in records]
    found = [claims(text) for text in thoughts]
    topics = Counter(topic for made in found for topic in {claim.topic for claim in made})
    wrong = [record.text for record in records if not record.is_correct]
    repeats = [-repetition_penalty(text, REPETITION) for text in wrong]
    defects = [flaws(text) for text in thoughts]
    imitated = [any(_imitates(sentence) for sentence in text.split(".")) for text in thoughts]
    percent = 100 / len(records)
    return {
        "claims per reasoning": fmean(map(len, found)),
        "different true claims": fmean(record.distinct_truths or 0 for record in records),
        "coherent": percent * sum(not defect for defect in defects),
        "repetition": percent * sum("repetition" in defect for defect in defects),
        "contradiction": percent * sum(bool(CONTRADICTIONS & {*defect}) for defect in defects),
        **{f"names {topic}": percent * topics[topic] for topic in TOPICS},
        "imitates finding": percent * sum(imitated),
        f"repeated {REPETITION}-grams in wrong answers": 100 * fmean(repeats) if repeats else math.nan,
    }


def _imitates(sentence: str) -> bool:
    """Whether a sentence looks like a finding, but cannot be read as one."""
    return sentence.strip().startswith(("There is a ", "There is an ")) and not claims(sentence)


CONTRADICTIONS = {
    *("two modalities", "two organs", "one kind twice", "impossible together", "seen and not seen"),
    *("findings and none", "clear and not clear"),
}
"""Flaws of texts that cannot be true of any image."""


def speed(rows: Sequence[Row]) -> dict[str, float]:
    """How fast training changed the completions, by means over ten steps: steps until they are twice as long, and
    until the reward part beside format and correctness, if there is one, has passed the middle of its change."""
    lengths = _means([row["completions/mean_length"] for row in rows if "completions/mean_length" in row])
    parts = {key.split("/")[1] for row in rows for key in row if re.fullmatch(r"rewards/\w+/mean", key)}
    added = sorted(parts - {"format", "correctness"})
    part = _means([row[f"rewards/{added[0]}/mean"] for row in rows] if len(added) == 1 else [])
    middle = (part[0] + part[-1]) / 2 if part else math.nan
    return {
        "reward, first steps": part[0] if part else math.nan,
        "reward, last steps": part[-1] if part else math.nan,
        "steps to the middle": _steps((mean >= middle) == (part[-1] >= middle) for mean in part),
        "steps to twice the tokens": _steps(mean >= 2 * lengths[0] for mean in lengths),
    }


def _means(values: Sequence[float]) -> list[float]:
    """Means over each :data:`WINDOW` values."""
    return [fmean(values[end - WINDOW : end]) for end in range(WINDOW, len(values) + 1)]


def _steps(reached: Iterable[bool]) -> float:
    """The last step of the first mean for which this is so, NaN if none."""
    return next((float(WINDOW + index) for index, is_so in enumerate(reached) if is_so), math.nan)


def cells(study: Path, test: str) -> dict[str, list[Path]]:
    """Arm -> files with the answers of its seeds."""
    found: dict[str, list[Path]] = {}
    for path in sorted(study.glob(f"*/seed*/eval/{test}-*/samples.jsonl")):
        if re.fullmatch(rf"{re.escape(test)}-[0-9a-f]+", path.parent.name):
            found.setdefault(path.relative_to(study).parts[0], []).append(path)
    return found


def table(study: Path, test: str) -> Iterable[dict[str, object]]:
    """A row for each arm, by name."""
    for arm, paths in cells(study, test).items():
        measured = [said(read_records(path)) | speed(read_run(path.parents[2]).steps) for path in paths]
        means = {column: f"{fmean(one[column] for one in measured):.2f}" for column in measured[0]}
        yield {"arm": arm, "seeds": len(paths), **means}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("--test", default="unseen", help="test set")
    arguments = parser.parse_args()
    rows = list(table(arguments.study, arguments.test))
    if not rows:
        parser.error(f"{arguments.study} has no finished test {arguments.test}: run it, or name another --test.")
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
