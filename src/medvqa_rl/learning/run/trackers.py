"""TensorBoard, Weights & Biases and Trackio, through :mod:`accelerate.tracking`.

Trackers are optional and receive copies: metrics.jsonl stays the record. Nothing leaves the machine unless
``train.tracker_online`` is set, completions are sent only as ``train.tracker_samples`` allows, and settings are sent
without full paths.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image
from pydantic import BaseModel, TypeAdapter

from medvqa_rl.config import Config
from medvqa_rl.config.sharing import shareable
from medvqa_rl.core.files import read_json
from medvqa_rl.core.network import NO_TELEMETRY
from medvqa_rl.core.types import Group
from medvqa_rl.learning.run.step_metrics import CompletionRecord
from medvqa_rl.learning.run.unchanged import RESTORE


class _Environment(BaseModel):
    started: str


_STARTED = TypeAdapter(_Environment)
PROJECT = "medvqa-rl"
COLUMNS = ("sample", "prompt", "question", "gold", "completion", "right", "reward", "advantage", "tokens")

_WANDB_PRIVACY: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "host": "localhost",
    "silent": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""Settings that stop W&B from collecting code, git state, command line, host name, packages and terminal output."""


class Trackers:
    """The trackers that ``train.trackers`` names."""

    def __init__(self, run: Path, config: Config, *, first_step: int) -> None:
        """
        Args:
            run: the run's folder, which contains env.json.
            first_step: steps completed before, when resuming.

        Raises:
            ValueError: a tracker is not installed, or would send data although ``train.tracker_online`` is false.
        """
        self._samples = config.train.tracker_samples
        self._trackers: dict[str, Any] = {}
        for name in config.train.trackers:
            tracker: TensorBoardTracker | WandBTracker | TrackioTracker
            match name:
                case "tensorboard":
                    tracker = TensorBoardTracker("tensorboard", run, purge_step=first_step + 1)
                case "wandb":
                    tracker = _wandb(run, config)
                case "trackio":
                    tracker = _trackio(run, config)
            try:
                tracker.start()
            except ImportError as error:
                raise ValueError(
                    f"train.trackers names {name}, which is not installed: pip install 'medvqa-rl[track]', or remove "
                    "it from the list (metrics.jsonl holds the same numbers)."
                ) from error
            if name == "wandb":
                # W&B's own step counter refuses the steps that a resumed run repeats.
                tracker.tracker.define_metric("*", step_metric="step")
            self._trackers[name] = tracker

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the finite metrics of a step."""
        values = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for name in self._trackers:
            self._log(name, step, values)

    def _log(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if name == "wandb":
            self._trackers[name].log({"step": step, **values})
        else:
            self._trackers[name].log(dict(values), step=step)

    def log_samples(self, step: int, records: Sequence[CompletionRecord], groups: Sequence[Group]) -> None:
        """Log completions, and the images of ``groups``, as far as ``train.tracker_samples`` allows."""
        if not self._trackers or self._samples == "none":
            return
        images: list[tuple[str, int, Image.Image]] = []
        if self._samples == "images":
            images = [(g.sample.id, i, image.load()) for g in groups for i, image in enumerate(g.sample.images)]
        for name, tracker in self._trackers.items():
            if name == "tensorboard":
                self._log(name, step, {f"samples/{r.sample_id}/{r.index}": _as_markdown(r) for r in records})
                pixels = {f"images/{sample}/{i}": np.asarray(image)[None] for sample, i, image in images}
                tracker.log_images(pixels, step, dataformats="NHWC")
                continue
            library = importlib.import_module(name)  # wandb and trackio both have Table and Image
            values = {"samples": library.Table(columns=list(COLUMNS), data=[_row(record) for record in records])}
            shown = {f"images/{sample}/{i}": library.Image(image, caption=sample) for sample, i, image in images}
            if name == "wandb" and shown:
                shown = {"images": list(shown.values())}
            self._log(name, step, values | shown)

    def close(self, *, failed: bool) -> None:
        """Finish the trackers' runs."""
        for name, tracker in self._trackers.items():
            if name == "wandb":
                tracker.tracker.finish(exit_code=int(failed))
            else:
                tracker.finish()


def _wandb(run: Path, config: Config) -> WandBTracker:
    """Weights & Biases, which writes to ``wandb`` in the run's folder; ``wandb sync`` uploads an offline run."""
    if not config.train.tracker_online:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # read on import
    return WandBTracker(
        PROJECT,
        name=run.resolve().name,
        id=run_id(run),
        resume="allow",
        dir=str(run),
        config=shareable(config.model_dump(mode="json")),
        mode="online" if config.train.tracker_online else "offline",
        settings=_WANDB_PRIVACY,
    )


def _trackio(run: Path, config: Config) -> TrackioTracker:
    """Trackio, which writes to a local database that ``trackio show`` reads."""
    if not config.train.tracker_online:
        remote = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if os.environ.get(name)]
        if remote:
            raise ValueError(
                f"{' and '.join(remote)} would make Trackio upload the run, but train.tracker_online is false: "
                "unset it, or set train.tracker_online=true."
            )
        os.environ |= NO_TELEMETRY
    name = f"{run.resolve().name}-{run_id(run)[:6]}"
    return TrackioTracker(PROJECT, name=name, config=shareable(config.model_dump(mode="json")), resume="allow")


def run_id(run: Path) -> str:
    """A unique id of the run, which stays the same when it is resumed."""
    started = read_json(_STARTED, run / "env.json", RESTORE).started
    return hashlib.sha256(f"{run.resolve()} {started}".encode()).hexdigest()[:16]


def _row(record: CompletionRecord) -> list[Any]:
    """A completion as a row of :data:`COLUMNS`."""
    asked = [record.sample_id, record.template, record.question, record.gold]
    return [*asked, record.completion, record.is_correct, record.reward, record.advantage, record.length]


def _as_markdown(record: CompletionRecord) -> str:
    """A completion as an indented block, which Markdown renders verbatim."""
    text = f"{record.question}\n\ngold: {record.gold}\n\nreward: {record.reward:.2f}\n\n{record.completion}"
    return "\n".join(f"    {line}" for line in text.splitlines())
