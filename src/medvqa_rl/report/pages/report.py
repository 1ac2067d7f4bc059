"""One self-contained page about one or several runs, from their folders alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medvqa_rl.config.sharing import shareable, without_folders
from medvqa_rl.core.files import note_on_best, write_text
from medvqa_rl.core.tables import TextTable
from medvqa_rl.core.text import number_of
from medvqa_rl.evaluation.judging.judged_tables import judged_tables, notes
from medvqa_rl.evaluation.statistics.tables import measured_table
from medvqa_rl.report.comparisons import Comparison, accuracy_rows, compare
from medvqa_rl.report.figures.charts import charts
from medvqa_rl.report.health import check_health
from medvqa_rl.report.pages.answers import PAGE, build_answers, counterpart, groups_of, shown_evaluations
from medvqa_rl.report.pages.rendering import render_with_script
from medvqa_rl.report.pages.viewer import Viewer, build_viewer, section_tags
from medvqa_rl.report.runs import StoredEvaluation, StoredRun, read_run
from medvqa_rl.rewards.attack.results import RESULT
from medvqa_rl.rewards.attack.tables import attack_lines, attack_tables

LIMITS = (
    "Research software, not for clinical use: nothing here may inform the care of a patient.",
    "Intervals resample the images of one evaluation. They do not cover another training seed or another hospital.",
    "Evaluations during training choose the best checkpoint. Judge a model on a test set that was used only once.",
)
"""What every report says about itself."""

MAX_BYTES = 10_000_000


@dataclass(frozen=True)
class Story:
    """An introduction above the report of a run."""

    title: str
    paragraphs: Sequence[str]
    comparisons: Mapping[str, tuple[str, str]]
    """Comparisons to show first, by name, with the title and note to show."""
    limits: Sequence[str] = ()


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    images: bool = True,
    story: Story | None = None,
    evals: Sequence[Path] = (),
) -> Path:
    """Read runs and write their page; its folder is created.

    Args:
        images: show the images of the sampled questions; otherwise no image file is opened.
        story: an introduction.
        evals: folders of evaluations outside the run, which must then be the only one.

    Raises:
        ValueError: a folder is not a run or an evaluation, evaluations are given with several runs, or two runs have
            the same name.
    """
    if evals and len(paths) > 1:
        raise ValueError(f"--evals is given with {len(paths)} runs, but belongs to a single one: report them apart.")
    runs = [read_run(path, evals) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two of the runs have the same name ({', '.join(names)}), so their curves could not be told apart: "
            "rename a folder, or give each run once."
        )
    return write_text(out, render_report(runs, images=images, story=story), errors="replace")


@dataclass(frozen=True)
class Served:
    """What a page of ``medvqa-rl view`` asks its server for, instead of holding it."""

    answers: str
    """Address of the evaluated questions; the page adds what is asked for."""
    groups: str
    """Address of the groups sampled during training."""
    ask: str
    """Address of the page that asks the run's model; empty for several runs."""
    lines: Sequence[str]
    """A remark on the progress of each run; may be empty."""
    compared: tuple[list[Comparison], list[str]]
    """What :func:`medvqa_rl.report.comparisons.compare` returned for the runs."""


def render_report(
    runs: Sequence[StoredRun], *, images: bool = True, story: Story | None = None, served: Served | None = None
) -> str:
    """Return the page as HTML.

    Args:
        served: make the page of the server; otherwise the page is self-contained.
    """
    comparisons, problems = compare(runs) if served is None else served.compared
    by_name = {item.name: item for item in comparisons}
    highlights = {} if story is None else story.comparisons
    rows = accuracy_rows(runs)
    settings = [{name: _setting(value) for name, value in shareable(run.config).items()} for run in runs]
    all_names = list(dict.fromkeys(name for one in settings for name in one))
    viewer, answers = Viewer((), {}, ()), Viewer((), {}, ())
    if served is None:
        viewer = build_viewer(runs, images=images)
        evaluations, answers = build_answers(runs, images=images)
        num_groups = len(viewer.groups)
    else:
        evaluations = shown_evaluations(runs, every=True)
        num_groups = sum(1 for run in runs for _ in run.path.glob("samples/step_*.jsonl"))
    return render_with_script(
        "report.html.j2",
        styles=("_style.css", "_scroll.css", "_report.css"),
        scripts=("_entries.js", "_viewer.js", *(() if served is None else ("_live.js",))),
        is_served=served is not None,
        data={
            "runs": [run.name for run in runs],
            "pageSize": PAGE,
            "groups": viewer.groups,
            "evaluations": list(evaluations),
            "against": counterpart(runs, list(evaluations)),
            "questions": answers.groups,
            "images": {**viewer.images, **answers.images},
            **section_tags(runs),
            **({} if served is None else {"answersFrom": served.answers, "groupsFrom": served.groups}),
        },
        runs=runs,
        story=story,
        served=served,
        highlights=[
            replace(by_name[name], name=title, note=note)
            for name, (title, note) in highlights.items()
            if name in by_name
        ],
        title=_title(runs, story, served),
        num_groups=num_groups,
        viewer_notes=list(map(without_folders, viewer.notes)),
        evaluations=list(evaluations),
        groups=groups_of(evaluations.values()),
        answer_notes=list(map(without_folders, answers.notes)),
        comparisons=[item for item in comparisons if item.name not in highlights],
        comparison_problems=list(map(without_folders, problems)),
        tables=[(item, tables) for item in comparisons if (tables := item.breakdown())],
        accuracy=rows,
        measured=measured_table([(f"{run}: {name}", item.results) for run, name, item in rows]),
        judged=[(f"{run}: {name}", *judged) for run, name, item in rows if (judged := _judged(item))],
        attacked=[(run.name, *_attacked(run)) for run in runs if run.attack],
        charts=charts(runs),
        health=[(run, check_health(run.metrics)) for run in runs],
        setting_rows=[(name, [one.get(name, "–") for one in settings]) for name in all_names],
        facts=[_facts(run) for run in runs],
        limits=(*(() if story is None else story.limits), *LIMITS),
    )


def _title(runs: Sequence[StoredRun], story: Story | None, served: Served | None) -> str:
    names = ", ".join(run.name for run in runs)
    return story.title if story is not None else names if served is not None else f"Report: {names}"


def _setting(value: object) -> str:
    """Return the value of a setting as text."""
    if value is None or value in ([], {}):
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _judged(evaluation: StoredEvaluation) -> tuple[list[TextTable], list[str]] | None:
    """Return the judges' results on an evaluation as tables and sentences; None if it was not judged."""
    if not evaluation.judged:
        return None
    return judged_tables(evaluation.judged), notes(evaluation.judged)


def _attacked(run: StoredRun) -> tuple[list[TextTable], list[str]]:
    """Return the attack on a run's rewards as tables and sentences."""
    result = RESULT.validate_python(run.attack)
    return attack_tables(result), attack_lines(result)


def _facts(run: StoredRun) -> dict[str, str]:
    """Return state, data and versions of a run."""
    status, env = run.status, run.env
    facts = {}
    try:
        note = note_on_best(run.path)
    except ValueError as error:  # a page shows what can be read
        note = str(error)
    if note is not None:
        facts["best checkpoint"] = note.replace(str(run.path), run.name)
    if status:
        facts["state"] = f"{status.get('state')}, step {status.get('step')} of {status.get('steps')}"
        if status.get("reason"):
            facts["reason"] = str(status["reason"])
    for number, resume in enumerate(run.resumes, start=1):
        changed = ", ".join(sorted(resume["settings"])) or "no setting"
        promise = resume.get("promise", "")
        facts[f"resume {number}"] = f"from step {resume['step']}, {changed} changed since the start. {promise}"
    for split, data in run.data.items():
        if isinstance(data, dict):
            samples = data.get("samples")
            size = "endless" if samples is None else number_of(samples, "sample")
            facts[f"{split} data"] = f"{data.get('name')}, {size}, fingerprint {data.get('fingerprint')}"
            if data.get("notes"):
                facts[f"{split} data, notes"] = ", ".join(f"{key}: {count}" for key, count in data["notes"].items())
    if isinstance(env.get("packages"), dict):
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in env["packages"].items())
    git = env.get("git")
    if isinstance(git, dict):
        notes = ["with uncommitted changes"] if git.get("is_dirty") else []
        facts["git"] = ", ".join([git.get("commit") or "unknown commit", *notes, *filter(None, [git.get("problem")])])
    for name in ("python", "platform", "gpu", "threads", "seed", "started"):
        if env.get(name) is not None:
            facts[name] = str(env[name])
    return facts
