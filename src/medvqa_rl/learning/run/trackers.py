"""Programs that show runs: TensorBoard, Weights & Biases and Trackio, behind one small interface.

They are extras and get copies: metrics.jsonl stays the record. Unless ``train.tracker_online`` is set they write to
this machine only. They get numbers only, unless ``train.tracker_samples`` says more, and never folders of settings.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from medvqa_rl.config import Config, shareable
from medvqa_rl.learning.run.step_metrics import CompletionRecord

Images = Mapping[str, Sequence[Image.Image]]
"""Decoded images by sample id; empty unless they were asked for."""

PROJECT = "medvqa-rl"
COLUMNS = ("sample", "prompt", "question", "gold", "completion", "right", "reward", "advantage", "tokens")


class Board(Protocol):
    """A program that shows a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the finite ones of a step's metrics."""
        ...

    def samples(self, step: int, records: Sequence[CompletionRecord], images: Images) -> None:
        """Show completions, with their images where there are any."""
        ...

    def close(self, *, failed: bool) -> None:
        """The run has ended."""
        ...


def open_boards(run: Path, config: Config, *, first_step: int) -> list[Board]:
    """Start the trackers that the settings name.

    Args:
        run: the run's folder, with its env.json.
        config: all settings.
        first_step: steps done before, where a run is resumed.

    Raises:
        ValueError: a tracker is not installed, or would send something although it must not.
    """
    boards: list[Board] = []
    for name in config.train.trackers:
        open_board: Callable[[Path, Config, int], Board]
        match name:
            case "tensorboard":
                open_board = TensorBoard
            case "wandb":
                open_board = WandB
            case "trackio":
                open_board = Trackio
        try:
            boards.append(open_board(run, config, first_step))
        except ImportError as error:
            raise ValueError(
                f"train.trackers names {name}, which is not installed: pip install 'medvqa-rl[track]', or take it out "
                "(metrics.jsonl holds the same numbers)."
            ) from error
    return boards


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def rows(records: Sequence[CompletionRecord]) -> list[list[Any]]:
    """Completions as rows of :data:`COLUMNS`."""
    return [
        [r.sample_id, r.template, r.question, r.gold, r.completion, r.is_correct, r.reward, r.advantage, r.length]
        for r in records
    ]


def run_id(run: Path) -> str:
    """A name that a run keeps when it is resumed, and that no other run has."""
    started = json.loads((run / "env.json").read_text(encoding="utf-8"))["started"]
    return hashlib.sha256(f"{run.resolve()} {started}".encode()).hexdigest()[:16]


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run: Path, config: Config, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in finite(metrics).items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, records: Sequence[CompletionRecord], images: Images) -> None:
        for record in records:
            text = f"{record.question}\n\ngold: {record.gold}\n\nreward: {record.reward:.2f}\n\n{record.completion}"
            # Indented: Markdown shows it as it is.
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            self._writer.add_text(f"samples/{record.sample_id}/{record.index}", indented, step)
        for sample, shown in images.items():
            for place, image in enumerate(shown):
                self._writer.add_image(f"images/{sample}/{place}", np.asarray(image), step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases: files under ``wandb`` in the run's folder, which ``wandb sync`` uploads; online if asked."""

    def __init__(self, run: Path, config: Config, first_step: int) -> None:
        if not config.train.tracker_online:
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # read when it is imported
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=PROJECT,
            name=run.resolve().name,
            id=run_id(run),
            resume="allow",
            dir=str(run),
            config=shareable(config),
            mode="online" if config.train.tracker_online else "offline",
            # What it would collect by itself: code, git, command line, host name, packages, the terminal's output.
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                host="localhost",
                silent=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("*", step_metric="step")  # a resumed run logs some steps again

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **finite(metrics)})

    def samples(self, step: int, records: Sequence[CompletionRecord], images: Images) -> None:
        table = self._wandb.Table(columns=list(COLUMNS), data=rows(records))
        shown = [self._wandb.Image(image, caption=sample) for sample, own in images.items() for image in own]
        self._run.log({"step": step, "samples": table, **({"images": shown} if shown else {})})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """Trackio: a database on this machine, which ``trackio show`` reads."""

    def __init__(self, run: Path, config: Config, first_step: int) -> None:
        remote = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]
        if remote and not config.train.tracker_online:
            raise ValueError(
                f"{' and '.join(remote)} would make Trackio send the run away, but train.tracker_online is false: "
                "unset it, or set train.tracker_online=true."
            )
        if not config.train.tracker_online:
            os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
            os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        import trackio

        self._trackio = trackio
        name = f"{run.resolve().name}-{run_id(run)[:6]}"
        self._run = trackio.init(project=PROJECT, name=name, config=shareable(config), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(finite(metrics), step=step)

    def samples(self, step: int, records: Sequence[CompletionRecord], images: Images) -> None:
        table = self._trackio.Table(columns=list(COLUMNS), data=rows(records))
        shown = {
            f"images/{sample}/{place}": self._trackio.Image(image, caption=sample)
            for sample, own in images.items()
            for place, image in enumerate(own)
        }
        self._run.log({"samples": table, **shown}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()
