"""Sampled answers of a PhantomVQA study: a CSV table with a row for each arm, to standard output.

    medvqa-rl eval CELL/config.yaml --checkpoint CELL/checkpoints/step_000200 --samples 1 --split test \\
        data.num_test=1000 --output SAMPLED/ARM-seed0                       # for each cell
    python -m dev.sampled SAMPLED --config CELL/config.yaml --baseline grpo data.num_test=1000

Greedy decoding can loop where sampling does not, so a study of rewards that move lengths needs both. The first sampled
answer to each question is counted as ``dev.said`` counts the greedy one. Differences from the baseline, in points, are
paired by seed and question, with 95 % intervals over seeds and images.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from dev.said import said
from medvqa_rl.config.yaml import load_config
from medvqa_rl.core.answers import parse_completion
from medvqa_rl.data import load_dataset
from medvqa_rl.data.phantom.claims import distinct_truths, faithfulness
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.world import Scene
from medvqa_rl.evaluation.records import EvalRecord, read_records
from medvqa_rl.evaluation.statistics.intervals_and_tests import seeds_and_clusters_bootstrap

Cells = dict[str, dict[str, list[EvalRecord]]]
"""Arm -> seed -> its records, by question."""


def sampled(record: EvalRecord, scene: Scene) -> EvalRecord:
    """The record with its first sampled answer in place of the greedy one."""
    answer = record.sampled[0]
    think = parse_completion(answer.output).think
    return replace(
        record,
        output=answer.output,
        think=think,
        answer=answer.answer,
        is_correct=answer.is_correct,
        num_tokens=answer.num_tokens,
        is_truncated=answer.is_truncated,
        faithfulness=faithfulness(think or "", scene),
        distinct_truths=distinct_truths(think or "", scene),
    )


def read_cells(folder: Path, scenes: Mapping[str, Scene]) -> Cells:
    """Read the evaluations in folders named ARM-seed0, ARM-seed1 and so on."""
    found: Cells = {}
    for path in sorted(folder.glob("*-seed*/samples.jsonl")):
        arm, seed = path.parent.name.split("-")[:2]
        records = [sampled(record, scenes[record.sample_id]) for record in read_records(path)]
        found.setdefault(arm, {})[seed] = sorted(records, key=lambda record: record.sample_id)
    return found


def measures(records: Sequence[EvalRecord]) -> dict[str, float]:
    """Measures of the answers of one cell, by column; percentages unless the column names another unit."""
    wrong = [record.num_tokens for record in records if not record.is_correct]
    claimed = [record.faithfulness for record in records if record.faithfulness is not None]
    return {
        "accuracy": 100 * fmean(bool(record.is_correct) for record in records),
        "tokens": fmean(record.num_tokens for record in records),
        "tokens of wrong answers": fmean(wrong) if wrong else float("nan"),
        "cut off": 100 * fmean(record.is_truncated for record in records),
        "true claims": 100 * fmean(claimed) if claimed else float("nan"),
        **said(records),
    }


def table(cells: Cells, baseline: str) -> Iterable[dict[str, object]]:
    """A row for each arm, by name."""
    for arm, seeds in cells.items():
        measured = [measures(records) for records in seeds.values()]
        means = {column: f"{fmean(one[column] for one in measured):.2f}" for column in measured[0]}
        others = cells[baseline]
        changes = [_changes(records, others[seed]) for seed, records in seeds.items() if seed in others]
        images = [record.image_key for record in next(iter(seeds.values()))]
        change = seeds_and_clusters_bootstrap({arm: changes}, images)[arm]
        yield {
            "arm": arm,
            "seeds": len(seeds),
            "accuracies": " ".join(f"{one['accuracy']:.1f}" for one in measured),
            "minus baseline": f"{100 * change.estimate:.2f}",
            "low": f"{100 * change.low:.2f}",
            "high": f"{100 * change.high:.2f}",
            "standard error": f"{100 * change.standard_error:.2f}",
            **means,
        }


def _changes(records: Sequence[EvalRecord], others: Sequence[EvalRecord]) -> list[int]:
    """By question, 1 if only the first is right, -1 if only the other is, else 0."""
    pairs = zip(records, others, strict=True)
    return [bool(one.is_correct) - bool(other.is_correct) for one, other in pairs]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the evaluations")
    parser.add_argument("--config", type=Path, required=True, help="settings of a cell, for its questions")
    parser.add_argument("--baseline", required=True, help="arm that the others are compared with")
    parser.add_argument("overrides", nargs="*", help="key=value")
    arguments = parser.parse_intermixed_args()
    data = load_dataset(load_config(arguments.config, arguments.overrides).config.data, "test")
    images = {sample.id: sample.images[0] for sample in (data[index] for index in range(len(data)))}
    scenes = {key: image.scene for key, image in images.items() if isinstance(image, PhantomImage)}
    cells = read_cells(arguments.folder, scenes)
    if arguments.baseline not in cells:
        parser.error(f"{arguments.folder} has no evaluation {arguments.baseline}-seed0; it has {', '.join(cells)}.")
    rows = list(table(cells, arguments.baseline))
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
