"""The page that asks a run's model about an image. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvqa_rl.report.pages.rendering import render_with_script
from medvqa_rl.report.pages.viewer import section_tags
from medvqa_rl.report.runs import StoredRun


@dataclass(frozen=True)
class Chosen:
    """An evaluated question whose image is asked about."""

    evaluation: str
    """Name of the evaluation's folder."""
    id: str
    question: str
    options: Sequence[str]
    gold: str
    """The gold answer: an option's letter, or text."""
    images: Sequence[str]
    """Addresses."""


def render_ask(
    run: StoredRun,
    *,
    back: str,
    send: str,
    models: Mapping[str, str],
    chosen: Chosen | None,
    suggested: Sequence[tuple[str, str]],
    defaults: Mapping[str, Any],
    limits: Mapping[str, int],
) -> str:
    """Return the page as HTML.

    Args:
        run: whose model is asked.
        back: address of the run's page.
        send: address to which questions are sent.
        models: what to show of each model of the run, by name.
        chosen: the question to start from.
        suggested: images to choose from: address of the image, and of this page with it.
        defaults: first values of ``max_length`` and ``temperature``.
        limits: largest ``count`` and ``max_length``.
    """
    return render_with_script(
        "ask.html.j2",
        styles=("_style.css", "_scroll.css", "_report.css"),
        scripts=("_entries.js", "_ask.js"),
        data={"runs": [run.name], "images": {}, "send": send, **section_tags([run])},
        is_served=True,
        run=run,
        back=back,
        models=models,
        chosen=chosen,
        suggested=suggested,
        defaults=defaults,
        limits=limits,
    )
