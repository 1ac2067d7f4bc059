"""The verb ``eval``: every data set with every prompt, each in its own folder, resumable and shared by processes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from rich.console import Console

from medvqa_rl.config import Config, DataConfig, ModelConfig
from medvqa_rl.core.files import remove_partials, write_text
from medvqa_rl.core.network import joining
from medvqa_rl.core.progress import open_console, progress_bar, to_stderr, waiting
from medvqa_rl.core.prompts import as_asked
from medvqa_rl.core.text import number_of
from medvqa_rl.core.types import DEFAULT_WORDING, Dataset, Sample, Template, Wording
from medvqa_rl.data import Split, load_dataset
from medvqa_rl.evaluation.answering import View, answer_all, chosen_samples
from medvqa_rl.evaluation.controls import make_controls, summarise_controls
from medvqa_rl.evaluation.evaluate import (
    Evaluation,
    check_unscored,
    make_evaluation,
    questions_hash,
    write_evaluation,
)
from medvqa_rl.evaluation.judging.instrument import as_instrument, load_eval_judge, rewarding_judges
from medvqa_rl.evaluation.measures.instruments import Instruments, load_instruments, measure, remaining
from medvqa_rl.evaluation.measures.protocols import (
    DIFFERENCES,
    TITLES,
    Protocol,
    difference_lines,
    summarise_protocol,
)
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.scoring import AnswerSettings
from medvqa_rl.evaluation.statistics.compare import Evaluated, compare, write_comparisons
from medvqa_rl.evaluation.statistics.comparison_tables import pairs_csv, show_pairs
from medvqa_rl.evaluation.statistics.tables import controls_table, protocols_table, results_table
from medvqa_rl.evaluation.store import RecordFile, Shard, agree, hold_shard, read_identity
from medvqa_rl.models.checkpoints import with_checkpoint
from medvqa_rl.models.fingerprint import weights_fingerprint
from medvqa_rl.models.loading import Policy, load_policy, resolve_device
from medvqa_rl.models.processor import trained_wording
from medvqa_rl.models.summary import describe
from medvqa_rl.rewards.judges import Judge, JudgeIdentity
from medvqa_rl.rewards.judges.load import notices, overlap
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.stock.generate import make_engine


@dataclass(frozen=True, eq=False)
class Cell:
    """One data set with one prompt."""

    data: DataConfig
    dataset: Dataset
    samples: Sequence[Sample]
    settings: AnswerSettings
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.dataset.name} ({self.settings.template})"


@dataclass(frozen=True)
class _Run:
    """What all cells of one command share."""

    config: Config
    model: ModelConfig
    wording: Wording
    policy: Callable[[], Policy]
    """Loads the model at the first call only: a complete evaluation is shown without it."""
    shard: Shard
    instruments: Instruments
    judges: Mapping[str, JudgeIdentity]
    """The judges that rewarded the model, and the one that evaluates it."""
    controls: bool
    protocols: Sequence[Protocol]
    console: Console

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


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
    protocols: Sequence[Protocol] = (),
) -> list[Evaluation]:
    """Evaluate one or several splits: print accuracy with intervals, write ``samples.jsonl`` and ``results.json``.

    Args:
        checkpoint: folder with the weights; defaults to the configured model.
        output: output folder; defaults to one under ``output_dir``, named after data and model.
        dry_run: answer one batch per cell, print its sizes and write nothing.
        data: data sets to evaluate besides the configured one.
        prompts: templates; defaults to the configured one.
        controls: also run the bias controls (:mod:`medvqa_rl.evaluation.controls`).
        shard: the part of the questions that this process answers; defaults to this rank's part under a launcher,
            else to all. The process that finds all answers present writes the results.
        resume: continue an interrupted evaluation, or show a complete one.
        protocols: other harnesses by whose rules the answers are scored too.

    Returns:
        The evaluations that are complete.

    Raises:
        ValueError: the data, model or folder cannot be used.
        EvaluationFailed: more than ``eval.fail_on_unscored`` of the questions could not be scored.
    """
    model = config.model if checkpoint is None else with_checkpoint(config.model, checkpoint)
    model_name = "" if output is not None else config.model.path if checkpoint is None else checkpoint.name
    base = Path(config.output_dir) / "eval" if output is None else output
    wording = config.prompt.wording
    if wording == DEFAULT_WORDING:
        wording = trained_wording(model.adapter, model.path)
    templates = tuple(prompts) or (wording.template if wording.instruction else config.prompt.template,)
    cells = plan_cells(config, [config.data, *data], templates, split=split, base=base, model_name=model_name)
    if output is not None and len(cells) == 1:
        cells = [replace(cells[0], folder=output)]
    console = open_console()

    @cache
    def policy() -> Policy:
        loaded = load_policy(model)
        loaded.processor.use(wording)
        to_stderr(describe(loaded))
        return loaded

    if dry_run:
        _dry_run(cells, policy, console)
        return []
    if shard is None:
        with joining():
            state = PartialState(cpu=resolve_device(model.device).type == "cpu")
        shard = Shard(state.process_index, state.num_processes)  # type: ignore[has-type]
    with ExitStack() as stack:
        for cell in cells:
            stack.enter_context(hold_shard(cell.folder, shard))
            _check_folder(cell.folder, shard, resume)
        # Loaded before the first answer, so that a missing model is reported at once.
        judge = load_eval_judge(config.eval_judge)
        instruments = load_instruments(config.eval, resolve_device(model.device).type, as_instrument(judge))
        rewarding = rewarding_judges(checkpoint)
        judges = rewarding | ({} if judge is None else {"evaluation": judge.identity})
        run = _Run(config, model, wording, policy, shard, instruments, judges, controls, protocols, console)
        for line in _notices(config, judge, rewarding):
            run.print(line)
        complete = {}
        for cell in cells:
            answers = _answer_cell(cell, run)
            if answers is None:
                run.print(f"{cell.label}: shard {shard} is done, others are missing.")
                continue
            with waiting(f"measuring the answers of {cell.label}"):
                complete[cell] = _make_results(cell, run, *answers)
            _print_results(cell, run, complete[cell])
        if len(complete) == len(cells) and len(templates) > 1:
            _compare_prompts(complete, run, base, model_name)
        for evaluation in complete.values():
            check_unscored(evaluation.results, config.eval)
        return list(complete.values())


def _notices(config: Config, judge: Judge | None, rewarding: Mapping[str, JudgeIdentity]) -> list[str]:
    """What the user should know about the judges: where texts are sent, and whether one judge does both jobs."""
    lines = notices(config, rewards=False)
    if judge is not None and not any(line.startswith("Warning") for line in lines):
        lines += filter(None, {overlap(identity, judge.identity) for identity in rewarding.values()})
    return lines


def plan_cells(
    config: Config,
    datas: Sequence[DataConfig],
    templates: Sequence[Template],
    *,
    split: Split,
    base: Path,
    model_name: str,
) -> list[Cell]:
    """Load the data sets and name a folder in ``base`` for each of them with each prompt.

    Raises:
        ValueError: a data set cannot be used, or two have the same name.
    """
    datasets = [load_dataset(data, split) for data in datas]
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"Two of the data sets are called {twice}, so their results could not be told apart: evaluate them one at "
            "a time, with different folders for --output."
        )
    cells = []
    for data, dataset in zip(datas, datasets):
        chosen = chosen_samples(dataset, config.eval)
        for template in templates:
            length = config.rollout.max_completion_length
            settings = AnswerSettings(config.eval, length, template, dataset.name, config.prefetch)
            folder = base / _file_name(dataset.name, model_name, template if len(templates) > 1 else "")
            cells.append(Cell(data, dataset, [as_asked(sample, template) for sample in chosen], settings, folder))
    return cells


def _file_name(*parts: str) -> str:
    """Join names into a file name; empty ones are left out."""
    return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, parts)))


def _dry_run(cells: Sequence[Cell], policy: Callable[[], Policy], console: Console) -> None:
    lines = ["Dry run: everything loads, and a batch is answered. Nothing was written."]
    for cell in cells:
        samples = cell.samples[: cell.settings.config.batch_size]
        length = cell.settings.max_completion_length
        engine = make_engine(policy(), cell.settings.template)
        groups = list(engine.greedy(samples, max_completion_length=length, batch_size=max(1, len(samples))))
        lines.append(f"  {cell.label}: {len(cell.samples):,} of {len(cell.dataset):,} questions")
        if groups:
            prompts = [len(group.prompt.input_ids) for group in groups]
            tokens = [len(group.completions[0].token_ids) for group in groups]
            lines.append(
                f"  batch: {number_of(len(groups), 'prompt')} of {min(prompts)} to {max(prompts)} tokens, "
                f"answers of {min(tokens)} to {max(tokens)} tokens"
            )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _check_folder(folder: Path, shard: Shard, resume: bool) -> None:
    """Refuse a folder whose content would be overwritten, or cannot be continued."""
    is_complete = (folder / "results.json").exists()
    if resume and is_complete and not read_identity(folder):
        raise ValueError(
            f"The evaluation in {folder} was not written by this command, so it cannot be continued: choose another "
            "folder with --output."
        )
    if not resume and is_complete:
        raise ValueError(
            f"The folder {folder} already holds an evaluation: choose another with --output, or show it with --resume."
        )
    if not resume and RecordFile(folder / "samples.jsonl", shard).exists():
        raise ValueError(
            f"The folder {folder} holds an evaluation that is not finished: continue it with --resume, or choose "
            "another with --output."
        )


def _answer_cell(cell: Cell, run: _Run) -> tuple[list[EvalRecord], dict[str, list[EvalRecord]]] | None:
    """Answer this shard's missing questions, those of the controls included.

    Returns:
        All records, and those of each control; None while other shards are unfinished.
    """
    settings, folder, shard = cell.settings, cell.folder, run.shard
    identity = _identity(cell, run.model, run.wording)
    agree(folder, identity, write=False)
    remove_partials(folder)

    def load_engine() -> RolloutEngine:
        policy = run.policy()
        threads = read_identity(folder).get("threads", torch.get_num_threads())  # may differ when resumed
        agree(folder, identity | {"weights": weights_fingerprint(policy.model), "threads": threads})
        return make_engine(policy, settings.template)

    def answer(name: str, path: Path, samples: Sequence[Sample], view: View | None) -> list[EvalRecord] | None:
        file = RecordFile(path, shard)
        own = samples[shard.index :: shard.count]
        with progress_bar(f"{cell.dataset.name} {settings.template} {name}".strip()) as progress:
            answer_all(load_engine, own, settings, view=view, done=file.read(), save=file.append, progress=progress)
        return file.settle([sample.id for sample in samples], [sample.id for sample in own])

    records = answer("", folder / "samples.jsonl", cell.samples, None)
    controls: dict[str, list[EvalRecord] | None] = {}
    if run.controls or (folder / "controls").is_dir():
        for control in make_controls(cell.samples, settings.config.seed):
            path = folder / "controls" / f"{control.name}.jsonl"
            controls[control.name] = answer(control.name, path, control.samples, control.view)
    answered = {name: rows for name, rows in controls.items() if rows is not None}
    return None if records is None or len(answered) < len(controls) else (records, answered)


def _make_results(
    cell: Cell, run: _Run, records: Sequence[EvalRecord], controls: Mapping[str, Sequence[EvalRecord]]
) -> Evaluation:
    """Measure the outputs, compute all results and write them."""
    measured = measure(records, remaining(records, run.instruments))
    evaluation = make_evaluation(measured, cell.samples, cell.dataset, cell.settings)
    results: dict[str, Any] = dict(evaluation.results)
    results["seeds"] = {**results["seeds"], "data": cell.data.seed}
    results["model"] = {**run.model.model_dump(mode="json"), "weights": read_identity(cell.folder).get("weights")}
    results["threads"] = read_identity(cell.folder).get("threads")
    results["config"] = run.config.model_copy(update={"data": cell.data}).model_dump(mode="json")
    if run.judges:
        results["judges"] = {role: identity.to_json() for role, identity in run.judges.items()}
    if controls:
        results["controls"] = summarise_controls(records, controls, run.config.eval)
    for protocol in _protocols(cell, run):
        summary, different = summarise_protocol(protocol, evaluation.records, run.config.eval)
        results.setdefault("protocols", {})[protocol] = summary
        write_text(cell.folder / DIFFERENCES.format(protocol), difference_lines(different))
    evaluation = Evaluation(evaluation.records, results, cell.folder)
    write_evaluation(evaluation, cell.folder)
    return evaluation


def _protocols(cell: Cell, run: _Run) -> list[Protocol]:
    """The protocols asked for, and those by which the evaluation was scored before."""
    return [name for name in TITLES if name in run.protocols or (cell.folder / DIFFERENCES.format(name)).exists()]


def _print_results(cell: Cell, run: _Run, evaluation: Evaluation) -> None:
    in_4_bits = ", base model in 4 bits" if run.model.load_in_4bit else ""
    title = f"{cell.label}: {run.model.adapter or run.model.path}{in_4_bits}"
    run.console.print(results_table(evaluation.results, title))
    if "controls" in evaluation.results:
        run.console.print(controls_table(evaluation.results))
    if "protocols" in evaluation.results:
        run.console.print(protocols_table(evaluation.results))
    run.print(f"Written: {cell.folder / 'results.json'} and samples.jsonl")


def _identity(cell: Cell, model: ModelConfig, wording: Wording) -> dict[str, Any]:
    """Everything that the answers depend on, except the weights, which are known only once they are loaded."""
    names = {"path", "adapter", "revision", "load_in_4bit", "dtype", "attention", "min_pixels", "max_pixels"}
    config = cell.settings.config
    instruments = {name: getattr(config, name) for name in ("perplexity_model", "similarity")}
    return {
        **{f"model.{name}": value for name, value in model.model_dump(mode="json", include=names).items()},
        "data": cell.dataset.name,
        "fingerprint": cell.dataset.fingerprint,
        "questions": questions_hash(cell.samples),
        "template": cell.settings.template,
        **({} if wording == DEFAULT_WORDING else {"prompt": json.loads(json.dumps(asdict(wording)))}),
        "max_completion_length": cell.settings.max_completion_length,
        **{f"eval.{name}": getattr(config, name) for name in ("num_samples", "temperature", "top_p", "seed")},
        **{f"eval.{name}": value for name, value in instruments.items() if value is not None},
    }


def _compare_prompts(complete: Mapping[Cell, Evaluation], run: _Run, base: Path, model_name: str) -> None:
    """Compare every two prompts on the same questions, per data set; print the tables and write them to ``base``."""
    by_data: dict[str, list[Evaluated]] = {}
    for cell, evaluation in complete.items():
        evaluated = Evaluated(cell.settings.template, cell.folder, evaluation.records)
        by_data.setdefault(cell.dataset.name, []).append(evaluated)
    for name, runs in by_data.items():
        comparison = compare(runs, run.config.eval, every_pair=True)
        show_pairs(comparison, run.console)
        stem = _file_name("prompts", name, model_name)
        write_comparisons([comparison], base / f"{stem}.json")
        write_text(base / f"{stem}.csv", pairs_csv(comparison))
        run.print(f"Written: {base / stem}.csv and .json")
