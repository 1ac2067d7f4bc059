"""The images of what a page shows: runs and evaluations store none, so they are looked up by sample id in the data set
of their settings, if that still has the same fingerprint. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medvqa_rl.config import Config
from medvqa_rl.core.files import read_json
from medvqa_rl.core.text import number_of
from medvqa_rl.core.types import Sample
from medvqa_rl.data import Split, load_dataset
from medvqa_rl.evaluation.pass_rates import load_training_set
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.results import read_origin
from medvqa_rl.learning.batching.sampler import step_samples
from medvqa_rl.report.pages.rendering import thumbnail_uri
from medvqa_rl.report.runs import StoredGroup, StoredRun

MAX_THUMBNAIL = 224
"""Longest side in pixels of the images in a report."""
_SPLITS: tuple[Split, ...] = ("test", "val", "train")


def samples_of_groups(run: StoredRun, groups: Sequence[StoredGroup]) -> tuple[dict[str, Sample], str]:
    """Find the samples of stored groups in the data set of the run's settings, by id.

    Returns:
        The samples, and a sentence if images cannot be shown, else an empty string.
    """
    if not groups:
        return {}, ""
    try:
        config = Config.model_validate(run.config)
    except ValueError:
        return {}, "the settings are missing or have another version, so the images cannot be found."
    try:
        dataset = load_training_set(config.data)
    except (ValueError, OSError) as error:
        return {}, f"the data set {config.data.name} is not available here, so no images are shown: {error}"
    known = run.data.get("train")
    if not isinstance(known, dict) or known.get("fingerprint") != dataset.fingerprint:
        return {}, (
            f"the data set {dataset.name} has changed since the run (another fingerprint), so no images are shown."
        )
    samples: Iterable[Sample]
    if dataset.is_endless:
        train = config.train
        samples = (
            draw.sample
            for step in sorted({group.step for group in groups})
            for draw in step_samples(dataset, step - 1, num_prompts=train.prompts_per_step, seed=train.seed)
        )
    else:
        samples = (dataset[index] for index in range(len(dataset)))
    wanted = {group.sample_id for group in groups}
    return {sample.id: sample for sample in samples if sample.id in wanted}, ""


def samples_of_records(
    folder: Path, records: Sequence[EvalRecord], *, remedy: str = "make the sheet with --no-images"
) -> dict[str, Sample]:
    """Load the samples of an evaluation's records, by id, from the data set in its settings.

    Args:
        remedy: what else helps, for messages.

    Raises:
        ValueError: the settings or the data set are missing, or the data set is not the one that was evaluated.
    """
    hint = f"restore the data, or {remedy}"
    origin = read_origin(folder)
    dataset, config = origin.get("dataset"), origin.get("config")
    own = folder.parent.parent / "config.resolved.json"
    if config is None and own.is_file():  # an evaluation during training uses the run's settings
        config = read_json(TypeAdapter(dict[str, Any]), own, hint)
    if dataset is None or config is None:
        raise ValueError(f"The evaluation in {folder} does not name its data set, so its images are unknown: {hint}.")
    try:
        data = Config.model_validate(config).data
    except ValueError as error:
        raise ValueError(f"The settings of the evaluation in {folder} are from another version: {hint}.") from error
    problems = []
    for split in _SPLITS:
        try:
            found = load_dataset(data, split)
        except (ValueError, OSError) as error:
            problems.append(f"{split}: {error}")
            continue
        if found.fingerprint == dataset.get("fingerprint"):
            wanted = {record.sample_id: record.image_key for record in records}
            samples = {sample.id: sample for index in range(len(found)) if (sample := found[index]).id in wanted}
            if any(id not in samples or samples[id].image_key != key for id, key in wanted.items()):
                break
            return samples
    details = f" ({' '.join(problems)})" if problems else ""
    raise ValueError(f"The data of the evaluation in {folder} cannot be found{details}: {hint}.")


class Thumbnails:
    """Images on the page, each stored once, until they take too much room."""

    def __init__(self, prefix: str, limit: int) -> None:
        """
        Args:
            prefix: of the images' keys on the page.
            limit: bytes of data URIs after which images are left out.
        """
        self.uris: dict[str, str] = {}
        self.num_left_out = 0
        self._prefix, self._limit = prefix, limit
        self._names: dict[tuple[str, str], str] = {}
        self._size = 0

    def add(self, sample: Sample, data: str, notes: list[str]) -> list[str]:
        """Add a sample's images and return their keys on the page.

        Args:
            data: tells data sets apart, whose images may have the same names.
            notes: gets a sentence for each image that cannot be read.
        """
        keys = []
        for image in sample.images:
            known = (data, image.key)
            if known not in self._names:
                if self._size >= self._limit:
                    self.num_left_out += 1
                    continue
                try:
                    uri = thumbnail_uri(image.load(), MAX_THUMBNAIL, lossless_bytes=8_000)
                except ValueError as error:
                    notes.append(str(error))
                    continue
                self._size += len(uri)
                self._names[known] = name = f"{self._prefix}{len(self._names)}"
                self.uris[name] = uri
            keys.append(self._names[known])
        return keys

    def note(self) -> list[str]:
        """A sentence if images were left out."""
        if not (left_out := self.num_left_out):
            return []
        verb = "is" if left_out == 1 else "are"
        return [f"{number_of(left_out, 'image')} {verb} left out to keep the page small."]
