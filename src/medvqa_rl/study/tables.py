"""The tables of a study as Markdown, CSV, LaTeX and one HTML page. Imports no torch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from medvqa_rl.evaluation.store import write_text
from medvqa_rl.report.page import environment
from medvqa_rl.study.collect import ArmResult, Collected

PUBLISHED = "published, other data and model"
NOTES = (
    "Accuracy in percent, differences in points, both means over seeds. Intervals of 95 % resample images and seeds "
    "together; three seeds are few, so each is listed. McNemar's test is exact, one for each seed, and takes "
    "questions as independent; Holm adjusts it for the arms of a table. Detectable: the true difference that is found "
    "with 80 % power. Lengths in tokens of the reasoning."
)


def _points(value: float | None, sign: str = "") -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:{sign}.1f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _mean(results: Sequence[Mapping[str, Any]], *path: str) -> float:
    """Mean over seeds of a number of results.json; NaN where a seed lacks it."""
    found = []
    for value in results:
        number: Any = value
        for key in path:
            number = number.get(key) if isinstance(number, Mapping) else None
        found.append(math.nan if number is None else float(number))
    return fmean(found)


def _by(results: Sequence[Mapping[str, Any]], section: str) -> str | None:
    """The instrument of a section; None where nothing was measured, or not by one instrument."""
    names = {value.get(section, {}).get("by") for value in results}
    return names.pop() if len(names) == 1 else None


def rows(arms: Iterable[ArmResult], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Column names and a row for each arm. Columns without any content are left out; numbers of different
    instruments have columns of their own."""
    arms = list(arms)
    cells: list[dict[str, str]] = []
    for arm in arms:
        row = {
            "arm": arm.name,
            "accuracy": _points(arm.accuracy.estimate),
            "95 % interval": f"{_points(arm.accuracy.low)} to {_points(arm.accuracy.high)}",
            "seeds": ", ".join(map(_points, arm.accuracies)),
            f"minus {baseline}": "" if arm.gain is None else _points(arm.gain.estimate, "+"),
            "its interval": (
                "" if arm.gain is None else f"{_points(arm.gain.low, '+')} to {_points(arm.gain.high, '+')}"
            ),
            "McNemar p": ", ".join(_p(test.mcnemar.p_value) for test in arm.tests),
            "Holm p": ", ".join(_p(test.holm_p) for test in arm.tests),
            "detectable": _points(arm.detectable),
            "format": _points(_mean(arm.results, "format_rate")),
            "length, right": _number(_mean(arm.results, "lengths", "think", "right", "mean"), ".0f"),
            "length, wrong": _number(_mean(arm.results, "lengths", "think", "wrong", "mean"), ".0f"),
            "true claims": _points(_mean(arm.results, "faithfulness", "value")),
        }
        for section, key, title, form in (
            ("thinking", "reward", "thinking reward of 2", ".2f"),
            ("perplexity", "value", "perplexity", ".1f"),
            ("similarity", "value", "similarity", ".2f"),
        ):
            if by := _by(arm.results, section):
                row[f"{title} ({by})"] = _number(_mean(arm.results, section, key), form)
        row[PUBLISHED] = "" if arm.published is None else f"{arm.published:g}"
        cells.append(row)
    titles = [*dict.fromkeys(title for row in cells for title in row if title != PUBLISHED), PUBLISHED]
    shown = [title for title in titles if any(row.get(title) for row in cells)]
    return shown, [[row.get(title, "") for title in shown] for row in cells]


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def as_csv(titles: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([titles, *body])
    return text.getvalue()


def as_markdown(titles: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [titles, ["---"] * len(titles), *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "$<$",
}


def as_latex(titles: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> str:
    """A table as LaTeX, with the rules of booktabs."""

    def line(cells: Sequence[str]) -> str:
        return (
            " & ".join("".join(_LATEX.get(character, character) for character in cell) for cell in cells) + " \\\\\n"
        )

    head = "\\begin{table}\n\\centering\n\\begin{tabular}{l" + "r" * (len(titles) - 1) + "}\n\\toprule\n"
    end = "\\bottomrule\n\\end{tabular}\n\\caption{" + line([caption]).removesuffix(" \\\\\n") + "}\n\\end{table}\n"
    return head + line(titles) + "\\midrule\n" + "".join(map(line, body)) + end


def write_tables(collected: Collected, folder: Path) -> list[Path]:
    """Write ``study.md``, ``study.html``, and ``TEST.csv`` and ``TEST.tex`` for each test set."""
    recipe = collected.recipe
    tables = {name: rows(arms, recipe.baseline) for name, arms in collected.tests.items()}
    captions = {
        name: f"{name}: {arms[0].num_questions} questions about {arms[0].num_clusters} images."
        for name, arms in collected.tests.items()
    }
    written = []

    def write(name: str, text: str) -> None:
        write_text(folder / name, text)
        written.append(folder / name)

    notes = [NOTES]
    if any(arm.published is not None for arms in collected.tests.values() for arm in arms):
        notes.append(f"{PUBLISHED[0].upper()}{PUBLISHED[1:]}: {recipe.note}")
    if collected.missing:
        notes.append(f"Not finished and not in the tables: {'; '.join(collected.missing)}.")
    lines = [f"# {recipe.title}\n"]
    for name, (titles, body) in tables.items():
        write(f"{name}.csv", as_csv(titles, body))
        write(f"{name}.tex", as_latex(titles, body, captions[name]))
        lines += [f"## {captions[name]}\n", as_markdown(titles, body)]
    lines += [f"{note}\n" for note in notes]
    lines += ["## Signs of failure\n"]
    lines += [f"- {label}: {' '.join(signs) if signs else 'none seen.'}" for label, signs in collected.signs.items()]
    write("study.md", "\n".join(lines) + "\n")
    html = (
        environment()
        .get_template("study.html.j2")
        .render(
            title=recipe.title,
            tables=[(captions[name], titles, body) for name, (titles, body) in tables.items()],
            notes=notes,
            signs=collected.signs,
        )
    )
    write("study.html", html)
    return written
