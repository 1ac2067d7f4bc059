"""What a run tells while it goes: metrics.jsonl, samples, trackers, and a progress bar or plain lines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from medvqa_rl.config import Config
from medvqa_rl.core.progress import duration
from medvqa_rl.core.types import Group
from medvqa_rl.learning.run.run_dir import RunDir
from medvqa_rl.learning.run.step_metrics import CompletionRecord, to_json
from medvqa_rl.learning.run.trackers import Images, open_boards

HEADLINE = ("reward", "loss", "kl", "completions/mean_length", "eval/accuracy", "eval/format_rate")
"""Metrics that a line shows; the bar has room for one."""


class RunLogger:
    """Writes the log files of a run and shows its progress; a context manager.

    metrics.jsonl gets every step. ``logging_steps`` thins out the terminal and the trackers only.
    """

    def __init__(self, run: RunDir, config: Config, *, first_step: int) -> None:
        self.has_failed = False
        """Whether the run ends by an error, which trackers show."""
        self._run = run
        self._config = config.train
        self._num_generations = config.rollout.num_generations
        self._console = Console(stderr=True)
        self._log: IO[str] = run.log.open("a", encoding="utf-8")
        self._metrics: IO[bytes] = run.metrics.open("ab")
        self._boards = open_boards(run.path, config, first_step=first_step)
        self._first_step, self._began = first_step, time.perf_counter()
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=16),
            TextColumn("{task.description}"),  # with our own time left: rich forgets steps of more than 30 seconds
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=config.train.steps, completed=first_step)
        self._description = ""

    def __enter__(self) -> RunLogger:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        for board in self._boards:
            board.close(failed=self.has_failed)
        self._metrics.close()
        self._log.close()

    def flush(self) -> int:
        """Force metrics.jsonl to disk and return its length in bytes."""
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def say(self, text: str) -> None:
        """A line for people: on the terminal and in train.log."""
        self._console.print(Text(text), soft_wrap=True)  # a command in it must stay in one piece
        self._write(text)

    def _write(self, text: str) -> None:
        self._log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")
        self._log.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step, or of the evaluation after it."""
        line = json.dumps({"step": step, **to_json(metrics)}) + "\n"
        self._metrics.write(line.encode())
        self._metrics.flush()
        is_evaluation = all(name.startswith("eval/") for name in metrics)
        is_due = step % self._config.logging_steps == 0 or step == self._config.steps
        for board in self._boards if is_due or is_evaluation else ():
            board.log(step, metrics)
        done = step - self._first_step
        if is_evaluation and not done:
            self._began = time.perf_counter()  # the evaluation before the first step tells nothing about steps
        rate = (time.perf_counter() - self._began) / max(1, done)
        shown = "  ".join(f"{name.rpartition('/')[2]} {metrics[name]:.3f}" for name in HEADLINE if name in metrics)
        left = f"{rate:.2f} s/step, {duration(rate * (self._config.steps - step))} left"
        line = f"step {step}/{self._config.steps}  {shown}" + ("" if is_evaluation else f"  {left}")
        self._write(line)
        if self._progress.disable:
            if is_due or is_evaluation:
                self._console.print(Text(line), soft_wrap=True)
            return
        if is_evaluation:
            self._console.print(Text(line))
        else:
            name = "reward" if "reward" in metrics else "loss"
            self._description = f"{name} {metrics[name]:.3f}  {left}"
        self._progress.update(self._task, completed=step, description=self._description)

    def evaluating(self, done: int, total: int) -> None:
        """Show how far an evaluation is."""
        self._progress.update(self._task, description=f"evaluating {done}/{total}")

    def samples(self, step: int, records: Sequence[CompletionRecord], groups: Sequence[Group] = ()) -> None:
        """Store a step's completions and show one group; trackers get what they are allowed to.

        Args:
            records: groups of ``num_generations`` each, group after group.
        """
        path = self._run.samples(step)
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"step": step, **record.to_json()}, default=str) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
        self._console.print(completions_table(step, group_to_show(records, self._num_generations)))
        if self._boards and self._config.tracker_samples != "none":
            images: Images = {}
            if self._config.tracker_samples == "images":
                images = {group.sample.id: [image.load() for image in group.sample.images] for group in groups}
            for board in self._boards:
                board.samples(step, records, images)


def group_to_show(records: Sequence[CompletionRecord], num_generations: int) -> Sequence[CompletionRecord]:
    """The first group that something is learned from, or the first one where all agree.

    Args:
        records: groups of ``num_generations`` each, group after group.
    """
    groups = [records[start : start + num_generations] for start in range(0, len(records), num_generations)]
    return next((group for group in groups if any(record.advantage for record in group)), groups[0])


def completions_table(step: int, group: Sequence[CompletionRecord]) -> Table:
    """The completions of one prompt with rewards and advantages, best first."""
    first = group[0]
    options = "".join(f"  {letter}: {text}" for letter, text in zip("ABCDEFGHIJ", first.options))
    table = Table(
        title=Text(f"Step {step}: {first.question}{options}  [gold: {first.gold}]"),
        title_justify="left",
        show_lines=False,
    )
    table.add_column("completion", ratio=1, overflow="fold")
    for name in (*first.rewards, "advantage", "tokens"):
        table.add_column(name, justify="right")
    for record in sorted(group, key=lambda record: -record.advantage)[:4]:
        tokens = f"{record.length}{'…' if record.is_truncated else ''}"
        rewards = [f"{value:.2f}" for value in record.rewards.values()]
        table.add_row(Text(record.completion), *rewards, f"{record.advantage:+.2f}", tokens)
    return table
