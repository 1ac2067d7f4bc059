"""What all data sets on disk share: finding the folder, the rows of a split, the limit on their number. No torch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import neutralise
from medvqa_rl.core.types import Sample
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.reading.hub import download
from medvqa_rl.data.reading.issues import count_issues, log_issues, refuse_if_too_many_dropped
from medvqa_rl.data.reading.rows import Reading, Row
from medvqa_rl.data.splits import NoSuchSplit, Split, StoredDataset, choose, connected, ids_hash, splits_of

SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Source:
    """How one data set is read."""

    title: str
    """Its name in messages."""
    files: Mapping[Split, Sequence[Path]]
    """The files that hold the rows of each official split."""
    read: Callable[[Path], Reading]
    images: Path
    """The folder that the rows' image paths are relative to."""
    names: Mapping[Split, str]
    """Names of the official splits, such as ``pmc_vqa/test_clean``."""
    val_from_train: bool = False
    """Whether the owners made no validation split, so that a tenth of the training images becomes one."""


def data_folder(config: DataConfig, title: str, patterns: Sequence[str]) -> Path:
    """The folder of a data set: ``data.path``, or the copy of a Hub repository at a pinned revision.

    Args:
        config: names either.
        title: the data set, for messages.
        patterns: the files that are wanted from the Hub.

    Raises:
        ValueError: neither is set, or the folder is not there.
    """
    if config.hub is not None and config.revision is not None:
        return download(config.hub, config.revision, patterns, cache_folder(config.cache_dir))
    if config.path is None:
        raise ValueError(f"data.path is not set, but {title} is read from a folder: set it to the one that holds it.")
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise ValueError(f"The data folder {root} does not exist: set data.path to the folder of {title}.")
    return root


def image_folder(root: Path, config: DataConfig, names: Sequence[str]) -> Path:
    """The folder of the images: ``data.image_folder`` below the data set's folder, or the first of the usual names.

    Raises:
        ValueError: there is none.
    """
    wanted = (config.image_folder,) if config.image_folder is not None else tuple(names)
    for name in wanted:
        if (root / name).is_dir():
            return root / name
    raise ValueError(
        f"There is no folder {' or '.join(map(repr, wanted))} in {root}: put the images there, or name their folder "
        "in data.image_folder."
    )


def load_split(source: Source, config: DataConfig, split: Split, root: Path) -> StoredDataset:
    """The samples of one split.

    ``data.split: official`` takes the files of the split. ``data.split: image`` reads all files and puts eight tenths
    of the images into training and one tenth each into validation and testing. Then ``data.answer_types`` and
    ``data.families`` filter, and ``data.num_*`` choose by the hash of (``data.seed``, id). A choice is named in the
    notes by its seed and a hash of the chosen ids.

    Raises:
        ValueError: a file is missing or cannot be read, too many rows are unusable, or no question is left.
    """
    is_official = config.split == "official"
    files = _files(source, split, is_official, root)
    reading = Reading()
    with collector_paused():
        for file in files:
            reading.extend(source.read(file))
    log_issues(reading.issues)
    refuse_if_too_many_dropped(
        reading.issues, total=reading.total, max_dropped=config.max_dropped, name=source.title, folder=root
    )
    rows = [row for row, place in zip(reading.rows, _places(source, reading.rows, config)) if place == split]
    kept = [row for row in rows if _is_wanted(row, config)]
    if not kept:
        raise ValueError(_nothing_left(source, rows, config, split, root))
    limit = {"train": config.num_train, "val": config.num_val, "test": config.num_test}[split]
    chosen = [kept[index] for index in choose([row.id for row in kept], limit, config.seed)]
    notes = count_issues(reading.issues) | {f"left out: {why}": count for why, count in reading.left_out.items()}
    if len(chosen) < len(kept):
        ids = ids_hash(row.id for row in chosen)
        notes[f"chosen of {len(kept)} by seed {config.seed}, ids {ids}"] = len(chosen)
    if count := sum("<" in row.question and neutralise(row.question)[1] > 0 for row in chosen):
        notes["neutralised: questions with special-token strings"] = count
    name = source.names[split] if is_official else f"{config.name}/image/{split}"
    return StoredDataset(name, Samples(chosen, source.images), notes, tuple(reading.issues))


def _files(source: Source, split: Split, is_official: bool, root: Path) -> list[Path]:
    """The files to read: those of the split, or all, each once."""
    if is_official:
        wanted = "train" if split == "val" and source.val_from_train else split
        files = list(source.files.get(wanted, ()))
        if not files:
            has = [name for name in SPLITS if source.files.get(name)]
            if not has:
                raise ValueError(
                    f"There are no files of {source.title} in {root}: set data.path to the folder that has them."
                )
            raise NoSuchSplit(
                f"{source.title} at {root} has no {split} split ({', '.join(has)} only): set "
                "data.split=image to make splits that share no image."
            )
    else:
        files = list(dict.fromkeys(file for name in SPLITS for file in source.files.get(name, ())))
    if not files:
        raise ValueError(f"There are no files of {source.title} in {root}: set data.path to the folder that has them.")
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(
            f"There is no file {missing[0].name!r} in {missing[0].parent}: set data.path to the folder of "
            f"{source.title} that holds it."
        )
    return files


def _places(source: Source, rows: Sequence[Row], config: DataConfig) -> list[str]:
    """The split of every row."""
    is_official = config.split == "official"
    if is_official and not source.val_from_train:
        return [row.place for row in rows]
    together = keep_together(rows)
    if is_official:
        places = splits_of(together, config.seed, test=0.0)
        return [places[name] if row.place == "train" else row.place for row, name in zip(rows, together)]
    places = splits_of(together, config.seed)
    return [places[name] for name in together]


def keep_together(rows: Sequence[Row]) -> list[str]:
    """For every row the name of what it must share a split with: rows that have an image or their article, case or
    patient in common, directly or through others, get the same name, and it does not depend on the rows' order. Slices
    of one volume are one image."""
    of_image: dict[str, str] = {}
    if all(len(row.images) == 1 and of_image.setdefault(row.images[0], row.together) == row.together for row in rows):
        return [row.together for row in rows]
    links = connected(
        (index, link)
        for index, row in enumerate(rows)
        for link in (("", row.together), *(split_fragment(image)[0] for image in row.images))
    )
    names: dict[int, str] = {}
    for index, row in enumerate(rows):
        names[links[index]] = min(row.together, names.get(links[index], row.together))
    return [names[links[index]] for index in range(len(rows))]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's search for reference cycles: rows have none, and walking all of them again and again takes longer
    than reading them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Samples(Sequence[Sample]):
    """Rows as samples, made when asked for: hundreds of thousands of them take a second that most uses can save."""

    def __init__(self, rows: Sequence[Row], images: Path) -> None:
        self._rows = rows
        self._images = images

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Samples: ...

    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self._rows[index], self._images)
        row = self._rows[index]
        return Sample(
            id=row.id,
            question=row.question,
            answer=row.answer,
            answer_type=row.answer_type,
            images=tuple(FileImage(path, self._images) for path in row.images),
            options=row.options,
            reasoning=row.reasoning,
            groups=row.groups,
            description=row.description,
        )


def _is_wanted(row: Row, config: DataConfig) -> bool:
    if row.answer_type not in config.answer_types:
        return False
    if not config.families:
        return True
    family = row.groups.get("family", "").lower()
    return any(wanted.lower() == family for wanted in config.families)


def _nothing_left(source: Source, rows: Sequence[Row], config: DataConfig, split: Split, root: Path) -> str:
    types = sorted({row.answer_type for row in rows})
    families = sorted({row.groups["family"] for row in rows if row.groups.get("family")})
    return (
        f"No question is left in the {split} split of {source.title} at {root} (of {len(rows)}): data.answer_types is "
        f"{list(config.answer_types)}, and it has {' and '.join(types) or 'none'}; data.families is "
        f"{list(config.families)}, and it has {', '.join(families[:20]) or 'none'}."
    )
