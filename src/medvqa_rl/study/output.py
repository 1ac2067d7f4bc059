"""Write the results of a study as Markdown, CSV, LaTeX, figures and one HTML page. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from medvqa_rl.core.files import write_text
from medvqa_rl.core.tables import as_csv, as_markdown
from medvqa_rl.core.text import as_markdown_text, number_of
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.tables import format_number
from medvqa_rl.report.health import Check
from medvqa_rl.report.pages.rendering import render
from medvqa_rl.report.runs import Row
from medvqa_rl.study.collect import Collected
from medvqa_rl.study.figures import write_figures
from medvqa_rl.study.findings import PartCorrelation, course
from medvqa_rl.study.tables import (
    NOTES,
    PUBLISHED,
    SECONDARY,
    as_latex,
    contrast_table,
    factor_cells,
    factor_csv,
    factor_rows,
    rows,
)
from medvqa_rl.study.trend_tables import (
    CHANGE_NOTE,
    change_rows,
    trend_csv,
    trend_note,
    trend_rows,
    worth_note,
    worth_rows,
)

CAPTIONS = {
    "Accuracy": "Mean over seeds with its 95 % interval over seeds and images; circles are seeds.",
    "Training": "Moving averages over a twentieth of the run: seeds thin, their mean thick, the baseline's mean grey. "
    "For supervised arms, which sample nothing, the first panel shows the loss.",
    "Length and accuracy": "Completion length on the primary test; hollow markers are seeds, filled ones their means.",
    "Reward parts and correctness": "Pearson's r within a step, averaged over the steps in which neither is constant; "
    "bars are means over seeds.",
}
COURSE_CAPTION = (
    "Entropy in nats per token and tokens per completion: means over the first and the last fifth of the steps and "
    "over seeds. The fall of the reward's moving average, and the largest gradient norm: those of the worst seed."
)
TREND_CAPTION = "Means over seeds with 95 % intervals over seeds and images; the numbers are evenly spaced."
MAX_SHOWN = 1200
"""Longest completion to show, in characters."""


@dataclass(frozen=True)
class FigureFile:
    """A figure to show: PNG files for the light and the dark theme."""

    title: str
    light: Path
    dark: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A table with a heading."""

    heading: str
    titles: Sequence[str]
    body: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Content:
    """The content of both pages."""

    title: str
    tests: Sequence[Section]
    contrasts: Sequence[Section]
    """Two tests of the same questions compared."""
    trends: Sequence[Section]
    """Measures against a number in which arms differ."""
    factors: Sequence[Section]
    """The paper's tables beside ours."""
    figures: Sequence[FigureFile]
    """Accuracy first."""
    course: Section | None
    """How training went."""
    parts: Section | None
    """Correlations of reward parts with correctness."""
    notes: Sequence[str]
    longest_wrong: Mapping[str, Sequence[Mapping[str, str]]]
    """Arm -> its longest wrong answers, formatted by :func:`_shortened`."""
    signs: Section | None
    found: Sequence[tuple[str, str, int, str]]
    """Arm, sign, seed and figure of every sign of failure that was found."""
    rules: Mapping[str, str]
    """Sign -> its rule."""


def write_study(collected: Collected, folder: Path) -> list[Path]:
    """Write the pages ``study.md`` and ``study.html``, the tables ``TEST.csv``, ``contrast-NUMBER.csv``,
    ``training.csv``, ``trend-NUMBER.csv`` (one number per line), ``change-NUMBER.csv``, ``worth-NUMBER.csv`` and
    ``factor-NAME.csv`` (each also as ``.tex``), and the figures in ``figures/``, in a light and a dark version.

    Returns:
        The files.
    """
    recipe, written = collected.recipe, list[Path]()

    def write(name: str, text: str) -> None:
        write_text(folder / name, text)
        written.append(folder / name)

    def write_table(name: str, section: Section, caption: str, as_data: str = "") -> Section:
        write(f"{name}.csv", as_data or as_csv(section.titles, section.body))
        write(f"{name}.tex", as_latex(section.titles, section.body, caption))
        return section

    tests, factors, contrasts, trends = [], [], [], list[Section]()
    for name, arms in collected.tests.items():
        caption = f"{name}: {arms[0].num_questions} questions about {arms[0].num_clusters} images."
        tests.append(write_table(name, Section(caption, *rows(arms, recipe.baseline)), caption))
    for table in recipe.tables:
        if cells := factor_cells(table, collected.tests[recipe.primary], recipe.baseline):
            notes = [text for text in (table.note, SECONDARY if table.published else "") if text]
            section = Section(f"{table.title} ({recipe.primary})", *factor_rows(cells), notes)
            caption = " ".join([f"{table.title}.", *notes])
            factors.append(write_table(f"factor-{table.slug}", section, caption, factor_csv(cells)))
    for number, (contrast, found) in enumerate(collected.contrasts, start=1):
        section = Section(contrast.title, *contrast_table(contrast, found))
        contrasts.append(write_table(f"contrast-{number}", section, f"{contrast.title}."))
    for number, trend in enumerate(collected.trends, start=1):
        section = Section(f"{trend.trend.title} ({trend.trend.test})", *trend_rows(trend), [trend_note(trend)])
        trends.append(
            write_table(f"trend-{number}", section, f"{trend.trend.title}. {trend_note(trend)}", trend_csv(trend))
        )
        if trend.changes:
            title = f"{trend.trend.title} ({trend.trend.test}): change"
            section = Section(title, *change_rows(trend), [CHANGE_NOTE])
            trends.append(write_table(f"change-{number}", section, f"{title}. {CHANGE_NOTE}"))
        if trend.worths:
            title = f"{trend.trend.title}: worth in RL steps"
            section = Section(title, *worth_rows(trend), worth_note(trend))
            trends.append(write_table(f"worth-{number}", section, " ".join([f"{title}.", *worth_note(trend)])))
    if training := _course_section(collected.curves):
        write_table("training", training, f"{training.heading}. {COURSE_CAPTION}")
    light = write_figures(collected, folder / "figures")
    dark = write_figures(collected, folder / "figures", "dark", "-dark")
    written += [*light.values(), *dark.values()]
    checks = [
        (arm, seed, check)
        for arm, cells in collected.signs.items()
        for seed, every in cells.items()
        for check in every
    ]
    content = Content(
        title=recipe.title,
        tests=tests,
        contrasts=contrasts,
        trends=trends,
        factors=factors,
        figures=[
            FigureFile(title, path, dark[title], CAPTIONS.get(title, TREND_CAPTION)) for title, path in light.items()
        ],
        course=training,
        parts=_correlation_section(collected.correlations),
        notes=_notes(collected),
        longest_wrong={
            arm: [_shortened(*answer) for answer in answers] for arm, answers in collected.longest_wrong.items()
        },
        signs=_sign_section(collected.signs),
        found=[(arm, check.name, seed, check.figure) for arm, seed, check in checks if check.verdict == "look"],
        rules={check.name: check.rule for _, _, check in checks},
    )
    write("study.md", _markdown(content, folder))
    write("study.html", render("study.html.j2", **vars(content)))
    return written


def _markdown(content: Content, folder: Path) -> str:
    """Format the page as Markdown, with links relative to a folder."""
    accuracy, *others = content.figures
    lines = [f"# {as_markdown_text(content.title)}\n", *_figure_lines(accuracy, folder)]
    for section in content.tests:
        lines += _section_lines(section, "##")
    if content.contrasts:
        lines.append("## Contrasts: the same questions under two conditions\n")
    for section in content.contrasts:
        lines += _section_lines(section, "###")
    for section in content.trends:
        lines += _section_lines(section, "##")
    lines += [f"{as_markdown_text(note)}\n" for note in content.notes]
    if content.factors:
        lines.append("## The paper's tables\n")
    for section in content.factors:
        lines += _section_lines(section, "###")
    for figure in others:
        lines += [f"## {figure.title}\n", *_figure_lines(figure, folder)]
        if figure.title == "Training" and content.course is not None:
            lines += _section_lines(content.course, "###")
    if content.parts is not None:
        lines.append(as_markdown(content.parts.titles, content.parts.body))
    lines += ["## Longest wrong answers\n", *_answer_lines(content.longest_wrong), "## Signs of failure\n"]
    if content.signs is not None:
        lines.append(as_markdown(content.signs.titles, content.signs.body))
    lines += [f"- **{arm}, seed {seed}**: {name}. {figure}" for arm, name, seed, figure in content.found]
    lines += ["", *(f"- {name}: {rule}" for name, rule in content.rules.items())]
    return "\n".join(lines) + "\n"


def _notes(collected: Collected) -> list[str]:
    notes = [NOTES]
    if any(arm.published is not None for arms in collected.tests.values() for arm in arms):
        notes.append(f"{PUBLISHED[0].upper()}{PUBLISHED[1:]}: {collected.recipe.note}")
    if collected.missing:
        notes.append(f"Unfinished, and not in the tables: {'; '.join(collected.missing)}.")
    return notes


def _section_lines(section: Section, level: str) -> list[str]:
    notes = [f"{as_markdown_text(note)}\n" for note in section.notes]
    return [f"{level} {as_markdown_text(section.heading)}\n", as_markdown(section.titles, section.body), *notes]


def _figure_lines(figure: FigureFile, folder: Path) -> list[str]:
    return [f"![{figure.title}]({figure.light.relative_to(folder).as_posix()})\n", f"{figure.caption}\n"]


def _course_section(curves: Mapping[str, Sequence[Sequence[Row]]]) -> Section | None:
    """A row for each arm that sampled completions."""
    titles = ["arm", "entropy, first", "entropy, last", "tokens, first", "tokens, last"]
    titles += ["largest fall of the reward", "gradient norm, largest / median"]
    body = []
    for arm, runs in curves.items():
        if not any("reward" in row for rows in runs for row in rows):
            continue
        found = course(runs)
        body.append(
            [
                arm,
                *(format_number(value, ".2f") for value in found.entropy),
                *(format_number(value, ".0f") for value in found.length),
                format_number(found.fall, ".2f"),
                format_number(found.spike, ".1f"),
            ]
        )
    return Section("Course of training", titles, body, [COURSE_CAPTION]) if body else None


def _correlation_section(found: Mapping[str, Sequence[PartCorrelation]]) -> Section | None:
    def mean(values: Sequence[float]) -> str:
        finite = [value for value in values if value == value]
        return f"{fmean(finite):+.2f}" if finite else ""

    body = [[arm, part.part, mean(part.first), mean(part.last)] for arm, parts in found.items() for part in parts]
    titles = ["arm", "reward part", "r with correctness, first half", "second half"]
    return Section("Reward parts and correctness", titles, body) if body else None


_VERDICTS = {"fine": "none", "not measured": "not measured"}


def _sign_section(signs: Mapping[str, Mapping[int, Sequence[Check]]]) -> Section | None:
    """A row for each arm and a column for each sign, with the seeds that show it."""
    names = dict.fromkeys(check.name for cells in signs.values() for checks in cells.values() for check in checks)
    if not names:
        return None
    body = []
    for arm, cells in signs.items():
        row = [arm]
        for name in names:
            verdicts = {seed: check.verdict for seed, every in cells.items() for check in every if check.name == name}
            seen = [str(seed) for seed, verdict in verdicts.items() if verdict == "look"]
            others = "; ".join(sorted({_VERDICTS[verdict] for verdict in verdicts.values() if verdict != "look"}))
            row.append(f"seed {', '.join(seen)}" if seen else others)
        body.append(row)
    return Section("Signs of failure", ["arm", *names], body)


def _shortened(label: str, record: EvalRecord) -> dict[str, str]:
    """Format an answer, cutting a long output."""
    end = ", truncated at the token limit" if record.is_truncated else ""
    return {
        "head": f"{label}, {number_of(record.num_tokens, 'token')}{end}",
        "question": record.question,
        "gold": record.reference,
        "output": record.output if len(record.output) <= MAX_SHOWN else record.output[:MAX_SHOWN] + " ...",
    }


def _answer_lines(longest_wrong: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """Headings and code blocks, with fences longer than any in the texts, so that nothing in them is markup."""
    lines = []
    for arm, answers in longest_wrong.items():
        lines.append(f"### {arm}\n")
        if not answers:
            lines.append("No wrong answer.\n")
        for shown in answers:
            text = f"question: {shown['question']}\ngold: {shown['gold']}\nanswer: {shown['output']}"
            fence = "`" * max([3, *(1 + len(run) for run in re.findall(r"`+", text))])
            lines += [f"{shown['head']}:\n", f"{fence}text\n{text}\n{fence}\n"]
    return lines
