"""What a run logs: metrics.jsonl, samples, train.log, the terminal, and optional trackers (trackers.py)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from types import TracebackType

from pydantic import BaseModel, Field, TypeAdapter
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from medvqa_rl.config import Config
from medvqa_rl.core.files import AppendedFile, read_json_lines, write_text
from medvqa_rl.core.progress import duration, heartbeat, open_console
from medvqa_rl.core.tables import TextTable
from medvqa_rl.core.types import Group
from medvqa_rl.learning.run.collapse import CollapseWatch
from medvqa_rl.learning.run.run_dir import RunDir
from medvqa_rl.learning.run.step_metrics import CompletionRecord, to_json
from medvqa_rl.learning.run.trackers import Trackers
from medvqa_rl.learning.run.unchanged import RESTORE

HEADLINE = ("reward", "loss", "kl", "completions/mean_length", "eval/accuracy", "eval/format_rate")
"""Metrics shown on a line of the terminal."""


class _Row(BaseModel, extra="allow"):
    """A line of metrics.jsonl."""

    step: int
    __pydantic_extra__: dict[str, float | None] = Field(init=False)


_ROW = TypeAdapter(_Row)


class RunLogger:
    """Writes a run's log files and shows its progress; a context manager.

    metrics.jsonl receives every step. ``logging_steps`` applies to the terminal and the trackers only.
    """

    def __init__(self, run: RunDir, config: Config, *, first_step: int) -> None:
        self.has_failed = False
        """Whether the run ends with an error, which W&B shows."""
        self._run = run
        self._config = config.train
        self._num_generations = config.rollout.num_generations
        self._console = open_console(stderr=True)
        self._watch = CollapseWatch()
        if run.metrics.exists():  # of a resumed run, which has reported what they show
            for row in read_json_lines(_ROW, run.metrics, RESTORE):
                self._watch.see(row.step, row.__pydantic_extra__)
        self._log, self._metrics = AppendedFile(run.log), AppendedFile(run.metrics)
        self._trackers = Trackers(run.path, config, first_step=first_step)
        self._first_step, self._started = first_step, time.perf_counter()
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=16),
            # Includes the time left: rich's own estimate ignores steps that took more than 30 seconds.
            TextColumn("{task.description}"),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=config.train.steps, completed=first_step)
        self._description = ""
        self._said: set[str] = set()
        self._evaluated = ""

    def __enter__(self) -> RunLogger:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._trackers.close(failed=self.has_failed)
        self._metrics.close()
        self._log.close()

    def flush(self) -> int:
        """Flush metrics.jsonl to disk and return the length of its complete lines in bytes."""
        self._restore()
        self._metrics.flush()
        return self._metrics.length

    def _restore(self) -> None:
        self._run.check_folder()
        for file in (self._log, self._metrics):
            if file.restore():
                self.say(f"{file.path} was removed or replaced during the run, and is written again.")

    def say(self, text: str) -> None:
        """Write a message to the terminal and train.log."""
        self._console.print(Text(text), soft_wrap=True)  # unwrapped, so that a command in it can be copied
        self.note(text)

    def say_once(self, text: str) -> None:
        """:meth:`say`, unless it was said before."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def note(self, text: str) -> None:
        """Write a message to train.log only."""
        self._log.append(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n".encode())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, or of the evaluation after it, and show them."""
        self.record(step, metrics)
        self.show(step, metrics)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics to metrics.jsonl."""
        self._restore()
        self._metrics.append((json.dumps({"step": step, **to_json(metrics)}) + "\n").encode())

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show recorded metrics on the terminal, in train.log and in the trackers, and warn of a collapse."""
        self._show(step, metrics)
        for collapse in self._watch.see(step, to_json(metrics)):
            self.say(f"Warning: step {step}: {collapse.text}")

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        is_evaluation = all(name.startswith("eval/") for name in metrics)
        is_due = is_evaluation or step % self._config.logging_steps == 0 or step == self._config.steps
        if is_due:
            self._trackers.log(step, metrics)
        steps_done = step - self._first_step
        if is_evaluation and not steps_done:
            self._started = time.perf_counter()  # the evaluation before the first step is not part of the step time
        step_time = (time.perf_counter() - self._started) / max(1, steps_done)
        shown = "  ".join(f"{name.rpartition('/')[2]} {metrics[name]:.3f}" for name in HEADLINE if name in metrics)
        left = f"{step_time:.2f} s/step, {duration(step_time * (self._config.steps - step))} left"
        line = f"step {step}/{self._config.steps}  {shown}" + ("" if is_evaluation else f"  {left}")
        self.note(line)
        if self._progress.disable:
            if is_due:
                self._console.print(Text(line), soft_wrap=True)
            return
        if is_evaluation:
            self._console.print(Text(line))
        else:
            name = "reward" if "reward" in metrics else "loss"
            self._description = f"{name} {metrics[name]:.3f}  {left}"
        self._progress.update(self._task, completed=step, description=self._description)

    def evaluating(self) -> AbstractContextManager[None]:
        """Show signs of life while the block evaluates."""
        self._evaluated = ""

        def show(line: str) -> None:
            self._progress.update(self._task, description=line)
            if self._progress.disable:
                self._console.print(Text(line), soft_wrap=True)
            self.note(line)

        return heartbeat(lambda seconds: f"evaluating{self._evaluated}, {duration(seconds)}", show)

    def show_evaluation_progress(self, done: int, total: int) -> None:
        """Show how many questions of an evaluation are done; with several ranks, of this rank's share."""
        self._evaluated = f" {done}/{total} questions"
        self._progress.update(self._task, description=f"evaluating {done}/{total}")

    def log_samples(self, step: int, records: Sequence[CompletionRecord], groups: Sequence[Group] = ()) -> None:
        """Write a step's completions to samples/ and the trackers, and show one group on the terminal.

        Args:
            records: groups of ``num_generations`` each, group after group.
            groups: groups whose images trackers may receive.
        """
        lines = [json.dumps({"step": step, **record.to_json()}, default=str) + "\n" for record in records]
        write_text(self._run.samples(step), "".join(lines))
        self._console.print(completions_table(step, group_to_show(records, self._num_generations)))
        self._trackers.log_samples(step, records, groups)


def group_to_show(records: Sequence[CompletionRecord], num_generations: int) -> Sequence[CompletionRecord]:
    """The first group with a nonzero advantage, or the first group if there is none.

    Args:
        records: groups of ``num_generations`` each, group after group.
    """
    groups = [records[start : start + num_generations] for start in range(0, len(records), num_generations)]
    return next((group for group in groups if any(record.advantage for record in group)), groups[0])


def completions_table(step: int, group: Sequence[CompletionRecord]) -> TextTable:
    """A group's completions with rewards and advantages, best first, at most four."""
    first = group[0]
    options = "".join(f"  {letter}: {text}" for letter, text in zip("ABCDEFGHIJ", first.options))
    rows = []
    for record in sorted(group, key=lambda record: -record.advantage)[:4]:
        tokens = f"{record.length}{'…' if record.is_truncated else ''}"
        rewards = ["" if value is None else f"{value:.2f}" for value in record.rewards.values()]
        rows.append((record.completion, *rewards, f"{record.advantage:+.2f}", tokens))
    return TextTable(
        f"Step {step}: {first.question}{options}  [gold: {first.gold}]",
        ("completion", *first.rewards, "advantage", "tokens"),
        rows,
        drop=("tokens", *reversed(first.rewards)),
    )
