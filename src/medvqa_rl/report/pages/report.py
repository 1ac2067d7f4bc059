"""One self-contained page about one or several runs, from their folders alone. Imports no torch.

The page loads nothing. Its content security policy allows the one script and the one style that are inside it, by
their hashes. The script gets its data as JSON and writes all text with ``textContent``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from medvqa_rl.evaluation.judging.judged_tables import judged_tables, notes
from medvqa_rl.evaluation.statistics.tables import TextTable, measured_table
from medvqa_rl.report.comparisons import accuracy_rows, compare
from medvqa_rl.report.figures.charts import charts
from medvqa_rl.report.health import check_health
from medvqa_rl.report.pages.inline import policy_hash, script_json
from medvqa_rl.report.pages.page import breakdown_table, environment, flat_settings
from medvqa_rl.report.pages.viewer import build_viewer
from medvqa_rl.report.runs import StoredEvaluation, StoredRun, read_run

LIMITS = (
    "Research software, not for clinical use: nothing here may inform the care of a patient.",
    "Intervals resample images of one evaluation. They do not cover another training seed or another hospital.",
    "Evaluations during training steer what is kept as best: judge a model by a test set that was looked at once.",
)
"""What every report says about itself."""

MAX_BYTES = 10_000_000


def write_report(paths: Sequence[Path], out: Path, *, images: bool = True) -> Path:
    """Read the runs and write the page, atomically; its folder is made.

    Args:
        images: show the images of the sampled questions; without, no image file is opened.

    Raises:
        ValueError: a folder is not that of a run, or two have the same name.
    """
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two of the runs have the same name ({', '.join(names)}), so their curves could not be told apart: "
            "rename a folder, or give each run once."
        )
    html = render_report(runs, images=images)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(html, encoding="utf-8", errors="replace")
    os.replace(partial, out)
    return out


def render_report(runs: Sequence[StoredRun], *, images: bool = True) -> str:
    """The page as HTML."""
    comparisons, problems = compare(runs)
    viewer = build_viewer(runs, images=images)
    templates = files("medvqa_rl.report") / "templates"
    style = "\n".join((templates / name).read_text(encoding="utf-8") for name in ("_style.css", "_report.css"))
    script = (templates / "_viewer.js").read_text(encoding="utf-8")
    keys = ("modality", "family", "answer_type")
    tables = [
        (
            item,
            [breakdown_table(key, item) for key in keys if key in item.before["by"] and key in item.after["by"]],
        )
        for item in comparisons
    ]
    settings = [flat_settings(run.config) for run in runs]
    all_names = list(dict.fromkeys(name for one in settings for name in one))
    policy = f"default-src 'none'; img-src data:; style-src {policy_hash(style)}; script-src {policy_hash(script)}"
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            runs=runs,
            title=f"Report: {', '.join(run.name for run in runs)}",
            policy=f"{policy}; base-uri 'none'; form-action 'none'",
            style=Markup(style),
            script=Markup(script),
            data=Markup(
                script_json({"runs": [run.name for run in runs], "groups": viewer.groups, "images": viewer.images})
            ),
            num_groups=len(viewer.groups),
            viewer_notes=viewer.notes,
            comparisons=comparisons,
            comparison_problems=problems,
            tables=[(item, found) for item, found in tables if found],
            accuracy=accuracy_rows(runs),
            measured=measured_table([(f"{run}: {name}", item.results) for run, name, item in accuracy_rows(runs)]),
            judged=[
                (f"{run}: {name}", *judged) for run, name, item in accuracy_rows(runs) if (judged := _judged(item))
            ],
            charts=charts(runs),
            health=[(run, check_health(run.metrics)) for run in runs],
            setting_rows=[(name, [one.get(name, "–") for one in settings]) for name in all_names],
            facts=[_facts(run) for run in runs],
            limits=LIMITS,
        )
    )


def _judged(evaluation: StoredEvaluation) -> tuple[list[TextTable], list[str]] | None:
    """What judges said of an evaluation, as tables and sentences; None where none did."""
    if not evaluation.judged:
        return None
    try:
        return judged_tables(evaluation.judged), notes(evaluation.judged)
    except (KeyError, TypeError, AttributeError):
        return [], ["judged.json is damaged or of another version: judge again."]


def _facts(run: StoredRun) -> dict[str, str]:
    """State, versions and data of a run."""
    status, env = run.status, run.env
    facts = {}
    if status:
        facts["state"] = f"{status.get('state')}, step {status.get('step')} of {status.get('steps')}"
        if status.get("reason"):
            facts["reason"] = str(status["reason"])
    for split, data in run.data.items():
        if isinstance(data, dict):
            samples = data.get("samples")
            size = "endless" if samples is None else f"{samples:,} samples"
            facts[f"{split} data"] = f"{data.get('name')}, {size}, fingerprint {data.get('fingerprint')}"
            if data.get("notes"):
                facts[f"{split} data, notes"] = ", ".join(f"{key}: {count}" for key, count in data["notes"].items())
    if isinstance(env.get("packages"), dict):
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in env["packages"].items())
    git = env.get("git")
    if isinstance(git, dict):
        facts["git"] = f"{git.get('commit')}{', with changes' if git.get('is_dirty') else ''}"
    for name in ("python", "platform", "gpu", "threads", "seed", "started"):
        if env.get(name) is not None:
            facts[name] = str(env[name])
    return facts
