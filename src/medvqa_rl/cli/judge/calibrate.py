"""``judge calibrate``: measure a judge against labels, print the results and write them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from medvqa_rl.config import JudgeConfig
from medvqa_rl.config.rollout_and_rewards import Sees
from medvqa_rl.core.files import write_json
from medvqa_rl.core.machine import claimed
from medvqa_rl.core.progress import open_console, print_line
from medvqa_rl.core.tables import TextTable
from medvqa_rl.data.phantom.claims import faithfulness
from medvqa_rl.data.phantom.drawing import SCANNERS, PhantomImage
from medvqa_rl.data.phantom.reasonings import Reasoning, draw_reasoning
from medvqa_rl.evaluation.judging.agreement import LabelledPair, MarginBin, by_group, margin_bins, read_pairs
from medvqa_rl.evaluation.judging.calibration import remember, worth
from medvqa_rl.evaluation.statistics.tables import KAPPA_NOTE, format_interval, format_kappa
from medvqa_rl.report.figures.plots import save_figure
from medvqa_rl.report.figures.style import styled
from medvqa_rl.rewards.judges import Grade, Judge, JudgeRequest
from medvqa_rl.rewards.judges.load import caches_folder, load_judge
from medvqa_rl.rewards.judges.protocol import seen

SPLIT = "held out"
"""Seeds questions and texts that no recipe trains on."""


def phantom_pairs(count: int, seed: int, *, sees: Sees = "text", with_policies: bool = True) -> list[LabelledPair]:
    """Held-out reasoning of the phantom world, labelled by its oracles: coherent for a judge of text; for one that
    sees, whether it makes claims of which every one is true of the image. Images come from all scanners in turn.

    Args:
        count: number of written texts (references, changed and damaged ones), and number of texts sampled by the
            embedded policies.
        sees: what the judge is shown.
        with_policies: whether the policies sample too, which takes a minute or two on a CPU.
    """
    texts = [draw_reasoning(seed, SPLIT, index) for index in range(count)]
    groups = ["reference" if text.kind == "reference" else "changed" for text in texts]
    if with_policies:
        from medvqa_rl.phantom.judge import sample_texts

        sampled = sample_texts(count, seed, SPLIT)
        texts += sampled
        groups += [text.kind.partition(" at ")[0] for text in sampled]
    return [
        _pair(text, group, sees, None if group.startswith("sampled") else tuple(SCANNERS)[index % len(SCANNERS)])
        for index, (text, group) in enumerate(zip(texts, groups))
    ]


def _pair(text: Reasoning, group: str, sees: Sees, scanner: str | None) -> LabelledPair:
    """A text with its label.

    Args:
        scanner: takes the image; None keeps the sample's.
    """
    sample, (image,) = text.sample, text.sample.images
    assert isinstance(image, PhantomImage)
    shown = PhantomImage(image.scene, scanner or image.scanner)
    label = text.is_coherent if sees == "text" else faithfulness(text.text, image.scene) == 1.0
    request = JudgeRequest(
        sample.question, sample.options, text.text, description=sample.description, images=seen([shown])
    )
    return LabelledPair(request, label, sample.id, group)


def run_calibrate(
    config: JudgeConfig,
    *,
    pairs_file: Path | None = None,
    output: Path | None = None,
    count: int = 600,
    seed: int = 0,
    with_policies: bool = True,
) -> dict[str, Any]:
    """Measure a judge against the phantom oracle and, if given, a file of labelled pairs.

    Args:
        config: the judge.
        pairs_file: JSON Lines (:func:`medvqa_rl.evaluation.judging.agreement.read_pairs`).
        output: folder for ``calibration.json`` and ``calibration.png``; None writes nothing.
        count, seed, with_policies: see :func:`phantom_pairs`.

    Returns:
        The content of ``calibration.json``.

    Raises:
        ValueError: the file, the folder or the judge cannot be used.
    """
    if output is None:
        return _calibrate(config, pairs_file, None, count, seed, with_policies)
    with claimed(output / "calibration.json"):
        if (output / "calibration.json").exists():
            raise ValueError(f"The folder {output} already holds a calibration: name another with --output.")
        return _calibrate(config, pairs_file, output, count, seed, with_policies)


def _calibrate(
    config: JudgeConfig, pairs_file: Path | None, output: Path | None, count: int, seed: int, with_policies: bool
) -> dict[str, Any]:
    """:func:`run_calibrate`, for the process that writes to ``output``."""
    if pairs_file is not None and config.sees != "text":
        raise ValueError(
            f"--sees is {config.sees}, but the texts of --pairs come without images and descriptions: leave one out."
        )
    sources = {"pairs": read_pairs(pairs_file)} if pairs_file is not None else {}
    judge = load_judge(config)
    phantom = phantom_pairs(count, seed, sees=config.sees, with_policies=with_policies)
    sources = {"phantom": phantom} | sources
    console = open_console()
    results: dict[str, Any] = {"judge": judge.identity.to_json(), "seed": seed, "sources": {}}
    curves: dict[str, list[MarginBin]] = {}
    for source, pairs in sources.items():
        grades = judge.grade([pair.request for pair in pairs])
        found = by_group(pairs, grades, seed=seed)
        curves[source] = _curve(pairs, grades)
        failures = Counter(grade.reason for grade in grades if not grade.is_scored)
        results["sources"][source] = {
            "groups": found,
            "margins": [asdict(item) for item in curves[source]],
            "failures": dict(failures.most_common(10)),
        }
        console.print(_table(found, f"{judge.identity.name} against {source}"))
        for reason, number in failures.most_common(3):
            print_line(console, f"{number} without a verdict: {reason}")
    last = list(sources)[-1]  # labels of your own count more than those of the phantom world
    found_worth = worth(results["sources"][last]["groups"]["all"], last)
    results |= {"counters": dict(judge.counters), **asdict(found_worth)}
    remember(caches_folder(config), judge.identity, found_worth)
    print_line(console, found_worth.summary)
    if output is not None:
        _write(results, curves, judge, output)
        print_line(console, f"Written: {output / 'calibration.json'}")
    return results


def _curve(pairs: Sequence[LabelledPair], grades: Sequence[Grade]) -> list[MarginBin]:
    """Margins against labels, in bins; empty for a judge without margins."""
    known = [(grade.margin, pair.is_coherent) for pair, grade in zip(pairs, grades) if math.isfinite(grade.margin)]
    return margin_bins([margin for margin, _ in known], [label for _, label in known]) if known else []


def _table(results: Mapping[str, Any], title: str) -> TextTable:
    return TextTable(
        title,
        ("texts", "number", "labelled yes", "accuracy %", "kappa", "false yes %", "false no %", "unscored %"),
        [
            (
                group,
                f"{row['n']:,}",
                f"{100 * row['label_yes_rate']:.0f} %",
                format_interval(row["accuracy"], 100, 1),
                format_kappa(row["kappa"]),
                format_interval(row["false_yes_rate"], 100, 1),
                format_interval(row["false_no_rate"], 100, 1),
                f"{100 * row['unscored_rate']:.1f}",
            )
            for group, row in results.items()
        ],
        notes=[KAPPA_NOTE],
        drop=("unscored %", "labelled yes", "false yes %", "false no %"),
    )


def _write(results: Mapping[str, Any], curves: Mapping[str, Sequence[MarginBin]], judge: Judge, output: Path) -> None:
    """Write the plot, if the judge gives margins, then the numbers."""
    if any(curves.values()):
        plot_calibration(curves, output / "calibration.png", title=judge.identity.name)
    write_json(output / "calibration.json", results)


def plot_calibration(curves: Mapping[str, Sequence[MarginBin]], path: Path, *, title: str) -> Path:
    """Plot the observed share of texts labelled Yes over the margin, and the share that the margin implies,
    1 / (1 + exp(-margin))."""
    with styled("light") as palette:
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        margins = [item.margin for bins in curves.values() for item in bins]
        edge = max(1.0, *map(abs, margins))
        grid = np.linspace(-edge, edge, 200)
        claimed = 1 / (1 + np.exp(-grid))
        axes.plot(grid, claimed, color=palette.before, linestyle="--", linewidth=1.2, label="implied by the margin")
        axes.axvline(0.0, color=palette.faint, linewidth=1.0)
        for (name, bins), color in zip(curves.items(), palette.series):
            if bins:
                observed = np.array([item.observed for item in bins])
                errors = np.array([[item.observed - item.low, item.high - item.observed] for item in bins]).T
                axes.errorbar(
                    [item.margin for item in bins],
                    observed,
                    np.maximum(errors, 0.0),
                    color=color,
                    marker="o",
                    markersize=4,
                    linewidth=1.4,
                    label=f"observed ({name})",
                )
        axes.set_title(f"Margin and truth: {title}")
        axes.set_xlabel('log P("Yes") - log P("No"), nats')
        axes.set_ylabel("labelled Yes")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(-0.03, 1.03)
        axes.legend(frameon=False)
        return save_figure(figure, path)
