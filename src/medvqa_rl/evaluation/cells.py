"""What the verb ``eval`` does: data sets x prompts, each in a folder that a killed run can continue and that several
processes can share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from rich.console import Console

from medvqa_rl.config import Config, DataConfig, ModelConfig
from medvqa_rl.core.files import write_text
from medvqa_rl.core.progress import open_console, progress_bar
from medvqa_rl.core.prompts import as_asked
from medvqa_rl.core.types import Dataset, Sample, Template
from medvqa_rl.data import Split, load_dataset
from medvqa_rl.evaluation.answering import Asking, Engine, View, answer_all, chosen_samples
from medvqa_rl.evaluation.controls import Control, make_controls, summarise_controls
from medvqa_rl.evaluation.evaluate import (
    Evaluation,
    check_unscored,
    controls_table,
    make_evaluation,
    questions_hash,
    write_evaluation,
)
from medvqa_rl.evaluation.judging.instrument import as_instrument, load_eval_judge, rewarding_judges
from medvqa_rl.evaluation.measures.instruments import Instruments, load_instruments, measure, remaining
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.compare import Evaluated, compare, pairs_csv, show_pairs, write_comparisons
from medvqa_rl.evaluation.store import RecordFile, Shard, agree, read_identity
from medvqa_rl.models.checkpoints import with_checkpoint
from medvqa_rl.models.fingerprint import weights_fingerprint
from medvqa_rl.models.loading import Policy, load_policy, resolve_device
from medvqa_rl.rewards.judges.load import notices, overlap
from medvqa_rl.rollout.decode import RolloutEngine


@dataclass(frozen=True)
class Cell:
    """One data set asked with one prompt."""

    data: DataConfig
    dataset: Dataset
    samples: Sequence[Sample]
    asking: Asking
    folder: Path

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self.samples]

    @property
    def label(self) -> str:
        return f"{self.dataset.name} ({self.asking.template})"


def plan(
    config: Config,
    datas: Sequence[DataConfig],
    prompts: Sequence[Template],
    *,
    model_name: str,
    split: Split,
    output: Path | None,
) -> list[Cell]:
    """All cells with their folders: ``output`` itself where there is only one, otherwise folders in it.

    Raises:
        ValueError: data cannot be used, or two data sets have the same name.
    """
    datasets = [load_dataset(data, split) for data in datas]
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"Two of the data sets are called {twice}, so their results could not be told apart: evaluate them one at "
            "a time, with different folders for --output."
        )
    base = Path(config.output_dir) / "eval" if output is None else output
    cells = []
    for data, dataset in zip(datas, datasets):
        chosen = chosen_samples(dataset, config.eval)
        for template in prompts:
            samples = [as_asked(sample, template) for sample in chosen]
            name = model_name if output is None else ""
            folder = base / _file_name(dataset.name, name, template if len(prompts) > 1 else "")
            if output is not None and len(datas) * len(prompts) == 1:
                folder = output
            length = config.rollout.max_completion_length
            asking = Asking(config.eval, length, template, dataset.name, config.prefetch)
            cells.append(Cell(data, dataset, samples, asking, folder))
    return cells


def _file_name(*parts: str) -> str:
    """Names as one name of a file; empty ones are left out."""
    return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, parts)))


def run_eval(
    config: Config,
    *,
    checkpoint: Path | None = None,
    split: Split = "test",
    output: Path | None = None,
    dry_run: bool = False,
    data: Sequence[DataConfig] = (),
    prompts: Sequence[Template] = (),
    controls: bool = False,
    shard: Shard | None = None,
    resume: bool = False,
) -> None:
    """Answer one or several splits, print accuracy with intervals and write ``samples.jsonl`` and ``results.json``.

    Args:
        checkpoint: folder of the weights; None takes the model of the settings.
        output: folder to write; None names one under ``output_dir`` by data and model.
        dry_run: answer one batch of each cell, show its sizes and write nothing.
        data: further data sets besides the one of the settings.
        prompts: templates to ask with; none takes that of the settings.
        controls: also ask with blank, shuffled and no images, and with the options in other orders.
        shard: the part of the questions that this process answers; None: its part of those that a launcher started,
            or all. The process that finds all answers written writes the results.
        resume: continue an evaluation that was stopped, or show one that is complete.

    Raises:
        ValueError: data, model or folder cannot be used.
        EvaluationFailed: more than ``eval.fail_on_unscored`` of the questions could not be scored.
    """
    model = config.model if checkpoint is None else with_checkpoint(config.model, checkpoint)
    model_name = config.model.path if checkpoint is None else checkpoint.name
    templates = tuple(prompts) or (config.prompt.template,)
    cells = plan(config, [config.data, *data], templates, model_name=model_name, split=split, output=output)
    if shard is None:
        state = PartialState(cpu=resolve_device(model.device).type == "cpu")
        shard = Shard(state.process_index, state.num_processes)  # type: ignore[has-type]
    for cell in cells if not dry_run else ():
        if not resume:
            _refuse_if_used(cell, shard)
        elif (cell.folder / "results.json").exists() and not read_identity(cell.folder):
            raise ValueError(
                f"The evaluation in {cell.folder} was not written by this command, so it cannot be continued: choose "
                "another folder with --output."
            )
    console = open_console()

    @cache
    def policy() -> Policy:
        return load_policy(model)

    if dry_run:
        _dry_run(cells, lambda cell: RolloutEngine(policy(), cell.asking.template), console)
        return
    # Before the first answer, so that a model that is not there is said at once.
    judge = load_eval_judge(config.eval_judge)
    rewarding = rewarding_judges(checkpoint)
    lines = notices(config, rewards=False)
    if judge is not None and not any(line.startswith("Warning") for line in lines):
        lines += filter(None, {overlap(one, judge.identity) for one in rewarding.values()})
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    instruments = load_instruments(config.eval, resolve_device(model.device).type, as_instrument(judge))
    judges = {role: identity.to_json() for role, identity in rewarding.items()}
    judges |= {} if judge is None else {"evaluation": judge.identity.to_json()}
    complete: list[tuple[Cell, Evaluation]] = []
    for cell in cells:
        evaluation = _evaluate_cell(
            cell, config, model, policy, shard, instruments, judges, controls=controls, console=console
        )
        if evaluation is not None:
            complete.append((cell, evaluation))
    if len(complete) == len(cells) and len(templates) > 1:
        base = Path(config.output_dir) / "eval" if output is None else output
        _compare_prompts(complete, config, base, model_name if output is None else "", console)
    for _, evaluation in complete:
        check_unscored(evaluation.results, config.eval)


def _refuse_if_used(cell: Cell, shard: Shard) -> None:
    if (cell.folder / "results.json").exists():
        raise ValueError(
            f"The folder {cell.folder} already holds an evaluation: choose another with --output, or show it with "
            "--resume."
        )
    if RecordFile(cell.folder / "samples.jsonl", shard).exists():
        raise ValueError(
            f"The folder {cell.folder} holds an evaluation that is not finished: continue it with --resume, or choose "
            "another with --output."
        )


def _evaluate_cell(
    cell: Cell,
    config: Config,
    model: ModelConfig,
    policy: Callable[[], Policy],
    shard: Shard,
    instruments: Instruments,
    judges: Mapping[str, Any],
    *,
    controls: bool,
    console: Console,
) -> Evaluation | None:
    """Answer what is missing; once all is there, write and print the results."""
    asking, folder = cell.asking, cell.folder
    identity = _identity(cell, model)
    agree(folder, identity, write=False)

    def engine() -> Engine:
        agree(folder, identity | {"weights": weights_fingerprint(policy().model)})
        return RolloutEngine(policy(), asking.template)

    def ask(name: str, file: RecordFile, samples: Sequence[Sample], view: View | None) -> list[EvalRecord] | None:
        own = samples[shard.index :: shard.count]
        with progress_bar(f"{cell.dataset.name} {asking.template} {name}".strip()) as progress:
            answer_all(engine, own, asking, view=view, done=file.read(), keep=file.append, progress=progress)
        return file.settle([sample.id for sample in samples])

    records = ask("", RecordFile(folder / "samples.jsonl", shard), cell.samples, None)
    passes: list[Control] = []
    if controls or (folder / "controls").is_dir():
        passes = make_controls(cell.samples, config.eval.seed)
    found: dict[str, list[EvalRecord] | None] = {}
    for control in passes:
        file = RecordFile(folder / "controls" / f"{control.name}.jsonl", shard)
        found[control.name] = ask(control.name, file, control.samples, control.view)
    if records is None or any(rows is None for rows in found.values()):
        console.print(f"{cell.label}: shard {shard} is done, others are missing.", highlight=False, soft_wrap=True)
        return None
    measured = measure(records, remaining(records, instruments))
    evaluation = make_evaluation(measured, cell.samples, cell.dataset, asking)
    results: dict[str, Any] = dict(evaluation.results)
    results["seeds"] = {**results["seeds"], "data": cell.data.seed}
    results["model"] = {**model.model_dump(mode="json"), "weights": read_identity(folder).get("weights")}
    results["config"] = config.model_copy(update={"data": cell.data}).model_dump(mode="json")
    if judges:
        results["judges"] = dict(judges)
    if passes:
        answered = {name: rows for name, rows in found.items() if rows is not None}
        results["controls"] = summarise_controls(records, answered, config.eval)
    evaluation = Evaluation(evaluation.records, results)
    write_evaluation(evaluation, folder)
    in_4_bits = ", base model in 4 bits" if model.load_in_4bit else ""
    console.print(evaluation.table(f"{cell.label}: {model.adapter or model.path}{in_4_bits}"))
    if passes:
        console.print(controls_table(results))
    console.print(f"Written: {folder / 'results.json'} and samples.jsonl", highlight=False, soft_wrap=True)
    return evaluation


def _identity(cell: Cell, model: ModelConfig) -> dict[str, Any]:
    """Everything that the answers depend on, but for the weights, which are known once they are loaded."""
    names = {"path", "adapter", "revision", "load_in_4bit", "dtype", "attention", "min_pixels", "max_pixels"}
    config = cell.asking.config
    return {
        **{f"model.{name}": value for name, value in model.model_dump(mode="json", include=names).items()},
        "data": cell.dataset.name,
        "fingerprint": cell.dataset.fingerprint,
        "questions": questions_hash(cell.samples),
        "template": cell.asking.template,
        "max_completion_length": cell.asking.max_completion_length,
        **{f"eval.{name}": getattr(config, name) for name in ("num_samples", "temperature", "top_p", "seed")},
        **{
            f"eval.{name}": by
            for name in ("perplexity_model", "similarity")
            if (by := getattr(config, name)) is not None
        },
    }


def _dry_run(cells: Sequence[Cell], engine: Callable[[Cell], Engine], console: Console) -> None:
    lines = ["Dry run: everything loads, and a batch is answered. Nothing was written."]
    for cell in cells:
        samples = cell.samples[: cell.asking.config.batch_size]
        length = cell.asking.max_completion_length
        groups = list(engine(cell).greedy(samples, max_completion_length=length, batch_size=max(1, len(samples))))
        lines.append(f"  {cell.label}: {len(cell.samples):,} of {len(cell.dataset):,} questions")
        if groups:
            prompts = [len(group.prompt.input_ids) for group in groups]
            tokens = [len(group.completions[0].token_ids) for group in groups]
            lines.append(
                f"  batch: {len(groups)} prompts of {min(prompts)} to {max(prompts)} tokens, "
                f"answers of {min(tokens)} to {max(tokens)} tokens"
            )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _compare_prompts(
    complete: Sequence[tuple[Cell, Evaluation]], config: Config, base: Path, model_name: str, console: Console
) -> None:
    """Print how every two prompts differ on the same questions, data set by data set, and write it beside them."""
    by_data: dict[str, list[Evaluated]] = {}
    for cell, evaluation in complete:
        run = Evaluated(cell.asking.template, cell.folder, evaluation.records)
        by_data.setdefault(cell.dataset.name, []).append(run)
    for name, runs in by_data.items():
        comparison = compare(runs, config.eval, every_pair=True)
        show_pairs(comparison, console)
        stem = _file_name("prompts", name, model_name)
        write_comparisons([comparison], base / f"{stem}.json")
        write_text(base / f"{stem}.csv", pairs_csv(comparison))
        console.print(f"Written: {base / stem}.csv and .json", highlight=False, soft_wrap=True)
