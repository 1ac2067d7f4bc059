"""Load one split of a data set on disk: what all such data sets have in common. Imports no torch."""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import first_few, neutralise
from medvqa_rl.core.types import AnswersAs, Sample
from medvqa_rl.data.images.files import FileImage, hidden
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.reading.hub import download
from medvqa_rl.data.reading.issues import RowIssue, count_issues, log_issues, refuse_if_too_many_dropped
from medvqa_rl.data.reading.rows import Reading, Row
from medvqa_rl.data.splits import SPLITS, Split, choose, connected, ids_hash, splits_of


class NoSuchSplit(ValueError):
    """Raised if a data set lacks a split; the message names the splits it has."""


@dataclass(frozen=True)
class StoredDataset:
    """The samples of one split. Texts are in memory, images stay on disk."""

    name: str
    samples: Sequence[Sample]
    notes: Mapping[str, int] = field(default_factory=dict)
    """Counts of dropped and repaired rows by reason, and other counts of the split."""
    issues: tuple[RowIssue, ...] = ()
    """Every dropped or repaired row of all files that were read."""
    about: tuple[str, ...] = ()
    """What the user's own files were recognised as, a sentence for each."""
    patients: Sequence[str] = ()
    """The patient of every sample, "" where the table names none; empty for data sets without patients."""
    is_endless: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, questions, options, gold answers and how they are compared, image names and descriptions in
        order, cut to 16 hexadecimal digits. In own data also of the columns for reward functions; published sets have
        theirs fixed."""
        digest = hashlib.sha256()
        for sample in self.samples:
            parts = (sample.id, sample.answer_type, sample.question, sample.answer, sample.image_key, *sample.options)
            digest.update(repr(parts).encode())
            digest.update(sample.description.encode())
            if sample.alternatives or sample.answers_as != "text":
                digest.update(repr((sample.alternatives, sample.answers_as)).encode())
            if sample.columns and self.name.startswith("own/"):
                digest.update(json.dumps(sample.columns, sort_keys=True).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """Where a data set is and how it is read."""

    title: str
    """Name of the data set in messages."""
    files: Mapping[Split, Sequence[Path]]
    """The files of each official split."""
    read: Callable[[Path], Reading]
    images: Path
    """The folder that the rows' image paths are relative to."""
    names: Mapping[Split, str] = field(default_factory=dict)
    """Names of the official splits; ``<data.name>/official/<split>`` by default."""
    val_from_train: bool = False
    """Whether a tenth of the training images becomes the validation split, because there is no official one."""
    is_own: bool = False
    """Whether ``data split`` can split its table."""


def data_folder(config: DataConfig, title: str, patterns: Sequence[str]) -> Path:
    """The folder of a data set: ``data.path``, or the download of ``data.hub`` at ``data.revision``.

    Args:
        title: name of the data set, for messages.
        patterns: the files to download from the Hub.

    Raises:
        ValueError: neither is set, or the folder does not exist.
    """
    if config.hub is not None and config.revision is not None:
        return download(config.hub, config.revision, patterns, cache_folder(config.cache_dir))
    if config.path is None:
        raise ValueError(f"data.path is not set, but {title} is read from a folder: set it to the folder's path.")
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise ValueError(f"The data folder {root} does not exist: set data.path to the folder of {title}.")
    return root


def image_folder(root: Path, config: DataConfig, names: Sequence[str]) -> Path:
    """The folder of the images below ``root``: ``data.image_folder``, or the first of the usual names that exists.

    Raises:
        ValueError: the folder does not exist.
    """
    wanted = (config.image_folder,) if config.image_folder is not None else tuple(names)
    for name in wanted:
        if (root / name).is_dir():
            return root / name
    raise ValueError(
        f"There is no folder {' or '.join(map(repr, wanted))} in {root}: put the images there, or set "
        "data.image_folder to the name of their folder."
    )


def load_split(source: Source, config: DataConfig, split: Split, root: Path) -> StoredDataset:
    """Load the samples of one split.

    ``data.split: official`` reads the files of the split. ``data.split: image`` reads all files and assigns 80 % of
    the images to training and 10 % each to validation and test. Rows are then filtered by ``data.answer_types`` and
    ``data.families`` and limited by ``data.num_*``, which keeps the smallest hashes of (``data.seed``, id). A limited
    split is identified in the notes by its seed and a hash of its ids.

    Args:
        root: folder of the data set, for messages.

    Raises:
        ValueError: a file is missing or unreadable, too many rows are unusable, or no question is left.
    """
    is_official = config.split == "official"
    files = _files_to_read(source, split, is_official, root)
    reading = Reading()
    with garbage_collection_paused():
        for file in files:
            reading.extend(source.read(file))
    log_issues(reading.issues, root)
    refuse_if_too_many_dropped(
        reading.issues,
        total=reading.total,
        max_dropped=config.max_dropped,
        name=source.title,
        folder=root,
        is_own=source.is_own,
    )
    splits = _assign_splits(source, reading.rows, config)
    rows = [row for row, assigned in zip(reading.rows, splits) if assigned == split]
    if (
        is_official
        and not source.val_from_train
        and not rows
        and (named := [name for name in SPLITS if name in splits])
    ):
        raise NoSuchSplit(_no_such_split(source, split, named, root))
    wanted = [row for row in rows if _is_wanted(row, config)]
    if not wanted:
        raise ValueError(_nothing_left(source, rows, config, split, root))
    limit = {"train": config.num_train, "val": config.num_val, "test": config.num_test}[split]
    chosen = [wanted[index] for index in choose([row.id for row in wanted], limit, config.seed)]
    notes = count_issues(reading.issues) | {f"left out: {why}": count for why, count in reading.left_out.items()}
    if is_official and split == "test" and (leaked := _images(rows) & _images(reading.rows, "train")):
        notes["test images that also occur in train"] = len(leaked)
    if len(chosen) < len(wanted):
        ids = ids_hash(row.id for row in chosen)
        notes[f"chosen of {len(wanted)} by seed {config.seed}, ids {ids}"] = len(chosen)
    if count := sum("<" in row.question and neutralise(row.question)[1] > 0 for row in chosen):
        notes["neutralised: questions with special-token strings"] = count
    name = f"{config.name}/{config.split}/{split}"
    if is_official:
        name = source.names.get(split, name)
    patients = [row.patient for row in chosen]
    samples = Samples(chosen, source.images, config.answers_as, hides_names=config.hide_names)
    issues = reading.issues
    if config.hide_names:
        issues = [issue._replace(detail="") for issue in issues]
    return StoredDataset(name, samples, notes, tuple(issues), tuple(reading.about), patients)


def _files_to_read(source: Source, split: Split, is_official: bool, root: Path) -> list[Path]:
    """The files of an official split, or all files.

    Raises:
        NoSuchSplit: there is no such official split.
        ValueError: there are no files, or one is missing.
    """
    available = [name for name in SPLITS if source.files.get(name)]
    if not available:
        raise ValueError(f"There are no files of {source.title} in {root}: set data.path to the folder that has them.")
    wanted = available
    if is_official:
        wanted = ["train" if split == "val" and source.val_from_train else split]
        if wanted[0] not in available:
            raise NoSuchSplit(_no_such_split(source, split, available, root))
    files = list(dict.fromkeys(file for name in wanted for file in source.files[name]))
    if missing := [file for file in files if not file.exists()]:
        raise ValueError(
            f"There is no file {missing[0].name!r} in {missing[0].parent}: set data.path to the folder of "
            f"{source.title} that holds it."
        )
    return files


def _no_such_split(source: Source, split: Split, available: Sequence[str], root: Path) -> str:
    tables = {file for files in source.files.values() for file in files}
    remedy = "set data.split=image to make splits that share no image"
    if source.is_own and len(tables) == 1:
        (table,) = tables
        folder = root.resolve()  # "." has no name
        new = folder.with_name(f"{folder.name}-split") / f"data{table.suffix}"
        places = f"--images {shlex.quote(str(source.images))} --output {shlex.quote(str(new))}"
        remedy += f", or write a table that has them with `medvqa-rl data split {shlex.quote(str(table))} {places}`"
    return f"{source.title} at {root} has no {split} split ({', '.join(available)} only): {remedy}."


def _assign_splits(source: Source, rows: Sequence[Row], config: DataConfig) -> list[str]:
    """The split of every row."""
    is_official = config.split == "official"
    if is_official and not source.val_from_train:
        return [row.split for row in rows]
    clusters = merge_clusters(rows)
    if is_official:
        splits = splits_of(clusters, config.seed, test=0.0)
        return [splits[cluster] if row.split == "train" else row.split for row, cluster in zip(rows, clusters)]
    splits = splits_of(clusters, config.seed)
    return [splits[cluster] for cluster in clusters]


def merge_clusters(rows: Sequence[Row]) -> list[str]:
    """The cluster of every row, after merging clusters that share an image, directly or through others.

    A merged cluster has the smallest of its names, so the result does not depend on the order of rows. Slices of one
    volume are one image.
    """
    of_image: dict[str, str] = {}
    if all(len(row.images) == 1 and of_image.setdefault(row.images[0], row.cluster) == row.cluster for row in rows):
        return [row.cluster for row in rows]
    components = connected(
        (index, link)
        for index, row in enumerate(rows)
        for link in (("", row.cluster), *(split_fragment(image)[0] for image in row.images))
    )
    names: dict[int, str] = {}
    for index, row in enumerate(rows):
        names[components[index]] = min(row.cluster, names.get(components[index], row.cluster))
    return [names[components[index]] for index in range(len(rows))]


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: rows have no cycles, and traversing them again and again takes longer than
    reading them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Samples(Sequence[Sample]):
    """Converts rows to samples on access: converting hundreds of thousands up front takes a second."""

    def __init__(
        self, rows: Sequence[Row], images: Path, answers_as: AnswersAs = "text", *, hides_names: bool = False
    ) -> None:
        self._rows = rows
        self._images = images
        self._answers_as = answers_as
        self._hides_names = hides_names

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Samples: ...

    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self._rows[index], self._images, self._answers_as, hides_names=self._hides_names)
        row = self._rows[index]
        return Sample(
            id=hidden(row.id) if self._hides_names else row.id,
            question=row.question,
            answer=row.answer,
            answer_type=row.answer_type,
            images=tuple(FileImage(path, self._images, self._hides_names) for path in row.images),
            options=row.options,
            reasoning=row.reasoning,
            groups=row.groups,
            description=row.description,
            alternatives=row.alternatives,
            answers_as=self._answers_as,
            columns=row.columns,
        )


def _is_wanted(row: Row, config: DataConfig) -> bool:
    """Whether a row passes ``data.answer_types`` and ``data.families``."""
    if row.answer_type not in config.answer_types:
        return False
    wanted = {family.lower() for family in config.families}
    return not wanted or not wanted.isdisjoint(family.lower() for family in _families(row))


def _families(row: Row) -> set[str]:
    """The family of a row; if it joins several by "+", also each of them."""
    family = row.groups.get("family", "")
    return {family, *family.split("+")} - {""}


def _images(rows: Sequence[Row], split: str | None = None) -> set[str]:
    """The images of all rows, or of the rows of an official split."""
    return {image for row in rows if split in (None, row.split) for image in row.images}


def _nothing_left(source: Source, rows: Sequence[Row], config: DataConfig, split: Split, root: Path) -> str:
    if not rows:
        return (
            f"No question is left in the {split} split of {source.title} at {root}: its table has none, or there are "
            "too few images or patients, which are split whole. Add questions about others, or a table for this split."
        )
    types = sorted({row.answer_type for row in rows})
    families = sorted({tag for row in rows for tag in row.groups.get("family", "").split("+") if tag})
    return (
        f"No question is left in the {split} split of {source.title} at {root} (of {len(rows)}): data.answer_types is "
        f"{list(config.answer_types)}, and it has {' and '.join(types) or 'none'}; data.families is "
        f"{list(config.families)}, and it has {first_few(families, 20) or 'none'}."
    )
