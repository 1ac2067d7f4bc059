"""``judge eval``: judge the answers of finished evaluations, and check the judges for agreement and bias.

```text
judged.json      results of each judge, their agreement and biases; judges, rubrics and seed
judged.md        the same as tables
judged.jsonl     each judge's grades of each answer, in the order of judged.json
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from medvqa_rl import __version__
from medvqa_rl.config import JudgeConfig
from medvqa_rl.config.problems.judge import EMBEDDED_JUDGES
from medvqa_rl.config.yaml import build_config, merge, parse_override
from medvqa_rl.core.files import write_json, write_text
from medvqa_rl.core.machine import claimed
from medvqa_rl.core.network import is_off
from medvqa_rl.core.progress import open_console, print_line
from medvqa_rl.evaluation.judging.instrument import read_identities, rewarding_judges
from medvqa_rl.evaluation.judging.judged import (
    Judged,
    NamedJudges,
    check_bias,
    chosen_records,
    judge_records,
    summarise_agreement,
    summarise_judged,
)
from medvqa_rl.evaluation.judging.judged_tables import judged_tables, notes
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.results import read_origin
from medvqa_rl.evaluation.statistics.compare import Evaluated, read_evaluations
from medvqa_rl.rewards.judges import JudgeIdentity
from medvqa_rl.rewards.judges.endpoint import host_of
from medvqa_rl.rewards.judges.load import load_judges
from medvqa_rl.rewards.judges.rubric import CORRECTNESS, REASONING

DEFAULT_JUDGES = ("phantom:judge_eval", "phantom:judge")
"""For the phantom world; the second one is the default judge of rewards."""
FILES = ("judged.json", "judged.md", "judged.jsonl")


def read_judge(text: str) -> JudgeConfig:
    """Parse a judge given on the command line: a model, or judge settings separated by commas, such as
    ``model=my-judge,endpoint=http://localhost:8000/v1``.

    Raises:
        ValueError: a setting is unknown or wrong.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()] if "=" in text else [f"model={text}"]
    given = {"network": "off" if is_off() else "on"}
    return build_config(merge(given, [parse_override(f"judge.{part}") for part in parts])).judge


def evaluations_in(path: Path) -> list[Evaluated]:
    """The evaluations to judge in a folder: its own, or those below it. Of the evaluations during a training, only the
    first and the last.

    Raises:
        ValueError: there are none, or one is not finished.
    """
    found = read_evaluations(path)  # sorted, so a run's steps are in order
    steps: dict[Path, list[Evaluated]] = {}
    for one in found:
        if re.fullmatch(r"step_\d+", one.folder.name):
            steps.setdefault(one.folder.parent, []).append(one)
    between = {one.folder for several in steps.values() for one in several[1:-1]}
    return [one for one in found if one.folder not in between]


def run_judge_eval(
    paths: Sequence[Path],
    judges: Sequence[JudgeConfig] = (),
    *,
    samples: int | None = None,
    bias_samples: int = 200,
    seed: int = 0,
    replace: bool = False,
) -> None:
    """Judge evaluations, print the results and write them into the evaluations' folders.

    Args:
        paths: folders of runs or evaluations.
        judges: one or two. Defaults to both embedded judges, which need phantom data.
        samples: maximum number of answers per evaluation; None judges all.
        bias_samples: number of answers judged again after an edit; 0 skips the bias checks.
        seed: for the choice of answers, the edits and the bootstrap.
        replace: overwrite earlier results.

    Raises:
        ValueError: an evaluation or a judge cannot be used; also if the only judge is the one that rewarded the model.
    """
    evaluations = list({one.folder: one for path in paths for one in evaluations_in(path)}.values())
    configs = _configs(evaluations, judges)
    with ExitStack() as stack:
        for one in evaluations:
            stack.enter_context(claimed(one.folder / FILES[0]))
        _judge_evaluations(evaluations, configs, samples, bias_samples, seed, replace)


def _judge_evaluations(
    evaluations: Sequence[Evaluated],
    configs: Sequence[JudgeConfig],
    samples: int | None,
    bias_samples: int,
    seed: int,
    replace: bool,
) -> None:
    """:func:`run_judge_eval`, for the process that writes to the evaluations' folders."""
    for one in evaluations:
        if not replace and (one.folder / FILES[0]).exists():
            raise ValueError(f"The evaluation in {one.folder} is judged already: overwrite that with --replace.")
    chosen = [chosen_records(one.records, samples, seed) for one in evaluations]
    for one, records in zip(evaluations, chosen):
        if not records:
            raise ValueError(f"No question of {one.folder} is scored: see unscored_reason in its samples.jsonl.")
        if all(config.model in EMBEDDED_JUDGES for config in configs) and not any(r.think for r in records):
            raise ValueError(
                f"No answer of {one.folder} contains reasoning, and the embedded judges read nothing else: name a "
                "chat or instruct model with --judge."
            )
    console = open_console()
    for config in configs:
        if config.endpoint is not None:
            print_line(
                console,
                "Notice: questions, options, reference answers, answers, reasoning and descriptions of images of "
                f"{sum(map(len, chosen)):,} answers are sent to {host_of(config.endpoint)}, images are not.",
            )
    loaded = [_load(config) for config in configs]
    identities = [next(iter(judge.judges.values())).identity for judge in loaded]
    if len({identity.fingerprint for identity in identities}) < len(loaded):
        raise ValueError(
            f"The two judges {' and '.join(judge.name for judge in loaded)} are the same model, which always agrees "
            "with itself: name two different ones with --judge."
        )
    warnings = [_overlap(one, identities) for one in evaluations]
    remarks: dict[str, None] = {}  # the same for most evaluations, so each is printed once, at the end
    for one, records, own_warnings in zip(evaluations, chosen, warnings):
        for line in own_warnings:
            print_line(console, line)
        judged = [judge_records(records, judge) for judge in loaded]
        results = _results(one, records, judged, own_warnings, samples=samples, bias_samples=bias_samples, seed=seed)
        _write(one.folder, results, records, judged)
        for table in judged_tables(results):
            console.print(table)
        remarks |= dict.fromkeys(line for line in notes(results) if line not in own_warnings)
        print_line(console, f"Written: {one.folder / FILES[0]}, {FILES[1]} and {FILES[2]}")
    for line in remarks:
        print_line(console, line)


def _configs(evaluations: Sequence[Evaluated], judges: Sequence[JudgeConfig]) -> list[JudgeConfig]:
    if len(judges) > 2:
        raise ValueError(
            f"{len(judges)} judges are named, but one or two can be compared: give --judge at most twice."
        )
    if any(config.sees == "image" for config in judges):
        raise ValueError(
            "A judge of --judge has sees=image, but evaluations store answers without their images: set sees=text or "
            "description."
        )
    foreign = [one for one in evaluations if not one.records[0].dataset.startswith("phantom/")]
    configs = list(judges) or [read_judge(name) for name in DEFAULT_JUDGES]
    embedded = [config.model for config in configs if config.model in EMBEDDED_JUDGES]
    if foreign and embedded:
        raise ValueError(
            f"The evaluation in {foreign[0].folder} is on {foreign[0].records[0].dataset or 'unnamed data'}, but the "
            f"embedded judges ({', '.join(embedded)}) only know the phantom world: name a chat or instruct model, or "
            "an endpoint's, with --judge."
        )
    return configs


def _load(config: JudgeConfig) -> NamedJudges:
    is_embedded = config.model in EMBEDDED_JUDGES
    rubrics = [REASONING] if is_embedded else [REASONING, CORRECTNESS]
    return NamedJudges(config.model, load_judges(config, rubrics), is_embedded)


def _overlap(one: Evaluated, identities: Sequence[JudgeIdentity]) -> list[str]:
    """Warn about judges that rewarded the evaluated model.

    Raises:
        ValueError: there is no other judge.
    """
    rewarding = {identity.fingerprint: identity.name for identity in _rewarding(one.folder).values()}
    same = [identity for identity in identities if identity.fingerprint in rewarding]
    if same and len(same) == len(identities):
        raise ValueError(
            f"The only judge, {same[0].name}, rewarded the model whose answers are in {one.folder}, so it would "
            "measure how well it was pleased, not how good the answers are: name another judge, or a second one, with "
            "--judge."
        )
    return [
        f"Warning: {identity.name} rewarded the model whose answers are in {one.folder} (as "
        f"{rewarding[identity.fingerprint]}), so its grades measure how well it was pleased: trust the other judge."
        for identity in same
    ]


def _rewarding(folder: Path) -> dict[str, JudgeIdentity]:
    """The judges that rewarded the evaluated weights, according to the evaluation's results or its run."""
    return rewarding_judges(folder) | read_identities(read_origin(folder))


def _results(
    one: Evaluated,
    records: Sequence[EvalRecord],
    judged: Sequence[Judged],
    warnings: Sequence[str],
    *,
    samples: int | None,
    bias_samples: int,
    seed: int,
) -> dict[str, Any]:
    checked = chosen_records(records, bias_samples, seed)
    found = [
        summarise_judged(records, item, seed=seed)
        | {"bias": check_bias(checked, item.judge, seed=seed) if bias_samples else None}
        for item in judged
    ]
    return {
        "evaluation": {
            "dataset": records[0].dataset,
            "template": records[0].template,
            "questions": len(one.records),
            "judged": len(records),
            "images": len({record.image_key for record in records}),
            "scorer_accuracy": sum(bool(record.is_correct) for record in records) / len(records),
        },
        "judges": found,
        "agreement": summarise_agreement(records, *judged, seed=seed) if len(judged) == 2 else None,
        "warnings": list(warnings),
        "settings": {"samples": samples, "bias_samples": bias_samples, "seed": seed, "version": __version__},
    }


def _write(folder: Path, results: Mapping[str, Any], records: Sequence[EvalRecord], judged: Sequence[Judged]) -> None:
    def graded(item: Judged, index: int) -> dict[str, Any]:
        grades = {of: grades[index] for of, grades in item.grades.items()}
        return {
            of: {"score": int(grade.score) if grade.is_scored else None, "reason": grade.reason}
            for of, grade in grades.items()
        }

    lines = [
        json.dumps({"sample_id": record.sample_id, "judges": [graded(item, index) for item in judged]})
        for index, record in enumerate(records)
    ]
    write_text(folder / FILES[2], "".join(line + "\n" for line in lines))
    tables = [table.markdown() for table in judged_tables(results)]
    text = "\n\n".join(["# Judged answers", *tables, *notes(results)])
    write_text(folder / FILES[1], text + "\n")
    write_json(folder / FILES[0], results)  # last: it marks the results as complete
