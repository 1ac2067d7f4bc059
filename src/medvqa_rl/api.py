"""The Python interface: train and evaluate from a program or a notebook (docs/python.md).

Nothing here changes the program around it for good: no working folder, no logging set-up, no exit; the handlers of
signals are replaced while a run trains in the main thread, and restored. Imports no torch until a function is called.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from medvqa_rl.config import Config, ConfigError, DataConfig, moved
from medvqa_rl.config.errors import MedVQAError
from medvqa_rl.config.yaml import build_config, check_config, load_config
from medvqa_rl.core.files import find_checkpoint, json_lines, read_json, run_config, step_of, temporary_folder
from medvqa_rl.core.text import number_of
from medvqa_rl.data.given import digest, is_stored, shared_images, store, stored
from medvqa_rl.learning.library import as_library, prepare
from medvqa_rl.rewards.given import Reward, with_rewards

if TYPE_CHECKING:
    from medvqa_rl.core.types import Dataset
    from medvqa_rl.data import Split
    from medvqa_rl.evaluation.evaluate import Evaluation
    from medvqa_rl.evaluation.measures.protocols import Protocol

    Settings = Config | str | PathLike[str]
    """Settings, or the path of a YAML file with them."""

_STATUS = TypeAdapter(dict[str, Any])
DATA = "data"
"""The folder of a run with the samples that a program gave."""


def train(
    model: str | PathLike[str] | None = None,
    reward_funcs: Reward | Sequence[Reward] | None = None,
    config: Settings | None = None,
    train_dataset: Iterable[object] | None = None,
    eval_dataset: Iterable[object] | None = None,
    *,
    reward_weights: Sequence[float] | None = None,
    resume: bool = False,
) -> Run:
    """Fine-tune with reinforcement learning, as ``medvqa-rl train`` does; arguments as those of TRL's GRPOTrainer.

    Args:
        model: a folder (of an adapter too), a Hub id or an embedded model, in place of ``model.path``.
        reward_funcs: functions with TRL's signature, names of built-in parts or dotted paths, in place of those in the
            settings.
        config: the settings.
        train_dataset: samples, or dicts with image, question and answer, such as a split of a Hugging Face dataset,
            in place of ``data``. They are stored in the run's folder.
        eval_dataset: the same for the evaluations of ``train.eval_steps``.
        reward_weights: the weight of each reward; 1 by default.
        resume: continue the run in ``output_dir``. Samples need not be given again; functions that cannot be imported
            must.

    Returns:
        The run, finished, or stopped by a signal that the program handles itself.

    Raises:
        MedVQAError: the settings, the data or the model cannot be used, or training failed.
    """
    with as_library():
        settings, functions = with_rewards(_with_model(_read(config), model), reward_funcs, reward_weights)

        def run(final: Config) -> Path:
            from medvqa_rl.learning.grpo import train as train_grpo

            return train_grpo(final, resume=resume, functions=functions)

        _run("train", settings, train_dataset, eval_dataset, run, resume=resume)
    return Run(settings.output_dir)


def sft(
    model: str | PathLike[str] | None = None,
    config: Settings | None = None,
    train_dataset: Iterable[object] | None = None,
    eval_dataset: Iterable[object] | None = None,
    *,
    resume: bool = False,
) -> Run:
    """Fine-tune with supervision, as ``medvqa-rl sft`` does; see :func:`train`."""
    with as_library():
        settings = _with_model(_read(config), model)

        def run(final: Config) -> Path:
            from medvqa_rl.learning.sft import train_sft

            return train_sft(final, resume=resume)

        _run("sft", settings, train_dataset, eval_dataset, run, resume=resume)
    return Run(settings.output_dir)


def evaluate(
    model: Run | str | PathLike[str],
    dataset: Iterable[object] | None = None,
    config: Settings | None = None,
    *,
    split: Split = "test",
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    protocols: Sequence[Protocol] = (),
) -> Evaluation:
    """Evaluate a model with greedy answers, as ``medvqa-rl eval`` does.

    Args:
        model: a run, whose best (else last) checkpoint is evaluated, the folder of a checkpoint, a Hub id or an
            embedded model.
        dataset: samples or records, as for :func:`train`, in place of ``data``. They are stored beside the results.
        config: the settings; by default those of the run, whose section ``model`` always counts.
        split: the split of ``data`` if no samples are given.
        output: a new folder for the results; by default one under ``output_dir``.
        resume: continue an interrupted evaluation in the same folder, or read a complete one.
        protocols: ``medevalkit`` and ``lmms_eval`` also score the answers by the rules of these harnesses.

    Raises:
        MedVQAError: the model, the data or the folder cannot be used, or too many questions could not be scored.
    """
    with as_library():
        settings, name = _read(config), model.folder if isinstance(model, Run) else model
        run = Path(_checked(name)).expanduser()
        if is_run := (run / "config.yaml").is_file():
            trained = moved(_read(run_config(run)), run)
            model_of_run = {"model": trained.model, "output_dir": trained.output_dir}
            settings = trained if config is None else settings.model_copy(update=model_of_run)
        else:
            settings = _with_model(settings, name)
        checkpoint = find_checkpoint(run) if is_run else run if run.is_dir() else None
        folder = None if output is None else Path(output).expanduser()
        if dataset is not None:
            home = Path(settings.output_dir).expanduser() if folder is None else folder
            data = _store_for_evaluation(dataset, home / DATA, settings)
            if is_run:
                _warn(shared_images(run / DATA, "train", Path(data.path or ""), "test"))
            settings, split = settings.model_copy(update={"data": data}), "test"
        check_config(settings, "eval")
        prepare(settings)
        from medvqa_rl.data.stored import NoSuchSplit
        from medvqa_rl.evaluation.cells import run_eval
        from medvqa_rl.evaluation.measures.protocols import read_protocols

        try:
            names = read_protocols(",".join(protocols)) if protocols else ()
            found = run_eval(
                settings, checkpoint=checkpoint, split=split, output=folder, resume=resume, protocols=names
            )
        except NoSuchSplit as error:
            error.add_note("Or give the questions as dataset.")
            raise
        if not found:
            raise MedVQAError(
                "Another process of the launcher completes this evaluation and has its results: evaluate in a single "
                "process, or with `medvqa-rl eval`."
            )
        return found[0]


def load_dataset(
    name: str, *, split: Split = "train", path: str | PathLike[str] | None = None, **settings: Any
) -> Dataset:
    """Load a split of a data set that the package knows: a sequence of :class:`Sample`.

    Args:
        name: ``data.name``, such as vqa_rad, slake_en or own; docs/data.md lists them.
        path: its folder; not needed for phantom.
        settings: further settings of the section ``data``.

    Raises:
        MedVQAError: there is no such data set, or it cannot be read.
    """
    with as_library():
        from medvqa_rl.data import load_dataset as load

        given = {"name": name, **({} if path is None else {"path": fspath(path)}), **settings}
        return load(build_config({"data": given}).data, split)


class Run:
    """A run in its folder, in whatever state, also one that the command line started."""

    def __init__(self, folder: str | PathLike[str]) -> None:
        """
        Raises:
            MedVQAError: the folder holds no run.
        """
        self.folder = Path(folder).expanduser()
        if not (self.folder / "status.json").is_file():
            raise MedVQAError(
                f"There is no run in {self.folder}: give the output_dir of a run, which has a status.json."
            )

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}: {self.state} after {number_of(self.step, 'step')})"

    @property
    def config(self) -> Config:
        """The current settings."""
        with as_library():
            return moved(_read(run_config(self.folder)), self.folder)

    @property
    def status(self) -> dict[str, Any]:
        """The content of ``status.json``: ``kind``, ``state``, ``step``, ``steps``, ``best_step`` and so on."""
        with as_library():
            return read_json(_STATUS, self.folder / "status.json", "restore the file")

    @property
    def state(self) -> str:
        """running, finished, stopped or failed."""
        return str(self.status["state"])

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return int(self.status["step"])

    @property
    def metrics(self) -> list[dict[str, float]]:
        """A dict for each training step, with ``step``; the names are TRL's."""
        return [dict(row) for row in self._stored().steps]

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """A dict for each evaluation during training, with ``step`` and names that begin with ``eval/``."""
        return [dict(row) for row in self._stored().evals]

    @property
    def checkpoint(self) -> Path:
        """The folder of the best checkpoint, if evaluations during training chose one, else of the last."""
        with as_library():
            return find_checkpoint(self.folder)

    def samples(self, step: int | None = None) -> list[dict[str, Any]]:
        """The logged completions (``train.log_completions_steps``) as dicts: of one step, or of all."""
        with as_library():
            files = sorted(path for path in self.folder.glob("samples/step_*.jsonl") if step in (None, step_of(path)))
            return [json.loads(line) for path in files for line in json_lines(path.read_text(encoding="utf-8"))]

    def evaluate(
        self,
        dataset: Iterable[object] | None = None,
        *,
        split: Split = "test",
        output: str | PathLike[str] | None = None,
        resume: bool = False,
    ) -> Evaluation:
        """Evaluate the run's checkpoint with its own settings; see :func:`evaluate`."""
        return evaluate(self, dataset, split=split, output=output, resume=resume)

    def report(self, output: str | PathLike[str] | None = None) -> Path:
        """Write the page of the run, ``report.html`` in its folder by default, and return its path."""
        with as_library():
            from medvqa_rl.report.pages.report import write_report

            return write_report([self.folder], self.folder / "report.html" if output is None else Path(output))

    def _stored(self) -> Any:
        with as_library():
            from medvqa_rl.report.runs import read_run

            return read_run(self.folder)


# --- settings -------------------------------------------------------------------------------------------------------


def _read(config: Settings | None) -> Config:
    if config is None or isinstance(config, Config):
        return config or Config()
    return load_config(fspath(config)).config


def _checked(model: str | PathLike[str]) -> str | PathLike[str]:
    if not isinstance(model, str | PathLike):
        raise ConfigError(
            [
                f"The model is a {type(model).__name__}, but must be a folder or a name: save yours with "
                "save_pretrained, its processor too, and give the folder."
            ]
        )
    return model


def _with_model(config: Config, model: str | PathLike[str] | None) -> Config:
    if model is None:
        return config
    path, adapter = fspath(_checked(model)), config.model.adapter
    if Path(path).expanduser().is_dir():
        from medvqa_rl.models.checkpoints import model_for

        found = model_for(path)
        path, adapter = found.path, found.adapter
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path, "adapter": adapter})})


# --- data -----------------------------------------------------------------------------------------------------------


def _run(
    kind: Literal["train", "sft"],
    config: Config,
    train_dataset: Iterable[object] | None,
    eval_dataset: Iterable[object] | None,
    run: Callable[[Config], Path],
    *,
    resume: bool,
) -> None:
    """Store the samples, check everything, and run."""
    run_folder = Path(config.output_dir).expanduser()
    folder, is_first = run_folder / DATA, os.environ.get("RANK", "0") == "0"
    is_new = not folder.exists()
    if train_dataset is None:
        if eval_dataset is not None:
            raise ConfigError(["eval_dataset is given without train_dataset: give both, or set data in the config."])
        if resume and is_stored(folder) and config.data.name == "phantom":
            config = config.model_copy(update={"data": stored(folder, config.data)})
        check_config(config, kind)
    else:
        if config.data.name != "phantom" and Path(config.data.path or "") != Path(config.output_dir) / DATA:
            raise ConfigError(
                [f"data.name is {config.data.name}, and a train_dataset is given too: leave out one of them."]
            )
        if config.train.eval_steps and eval_dataset is None:
            raise ConfigError(["train.eval_steps is set, but there is no eval_dataset: give one, or set it to 0."])
        path = Path(config.output_dir) / DATA
        config = config.model_copy(update={"data": stored(path, config.data)})
        check_config(config, kind)
        if resume and not is_stored(folder):
            raise ConfigError([f"The run in {run_folder} has no stored samples: resume it without train_dataset."])
        if is_first and not resume:
            from medvqa_rl.learning.run.run_dir import RunDir

            RunDir(run_folder).refuse_a_run()
    prepare(config)
    try:
        if train_dataset is not None:
            given = {"train": train_dataset, **({} if eval_dataset is None else {"val": eval_dataset})}
            store(given, folder, config.data, resume=resume)  # type: ignore[arg-type]
            _warn(shared_images(folder, "train", folder, "val"))
        run(config)
        if "RANK" in os.environ:  # the first rank writes how the run ended
            from accelerate.state import PartialState

            PartialState().wait_for_everyone()
    except BaseException:
        if is_new and is_first and not (run_folder / "status.json").exists():  # it has not started
            shutil.rmtree(folder, ignore_errors=True)
            _remove_if_empty(run_folder)
        raise
    if is_first:
        from medvqa_rl.report.card import write_cards

        write_cards(run_folder)


def _store_for_evaluation(dataset: Iterable[object], home: Path, config: Config) -> DataConfig:
    """Store the questions of an evaluation in a folder below ``home`` that is named by their content."""
    try:
        with temporary_folder(home / "new") as temporary:
            store({"test": dataset}, temporary, config.data)
            folder = home / digest(temporary)
            if not folder.exists():
                temporary.rename(folder)
    except BaseException:
        for empty in (home, home.parent):
            _remove_if_empty(empty)
        raise
    return stored(folder, config.data)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _warn(text: str) -> None:
    if text:
        warnings.warn(text, stacklevel=4)
