"""VQA-RAD (Lau et al. 2018, CC0): questions of clinicians about radiology images, read as its owners publish it.

The folder holds ``VQA_RAD Dataset Public.json`` and the images in ``images/`` (or ``VQA_RAD Image Folder/``, as in the
owners' archive). Imports no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medvqa_rl.config import DataConfig
from medvqa_rl.data.images import FileImage
from medvqa_rl.data.issues import RowIssue, count_issues, log_issues, refuse_if_too_many_dropped
from medvqa_rl.data.splits import Split, StoredDataset, choose, connected, split_of
from medvqa_rl.prompts import neutralise, normalise
from medvqa_rl.types import AnswerType, Sample

FILE = "VQA_RAD Dataset Public.json"
IMAGE_FOLDERS = ("images", "VQA_RAD Image Folder")

ORGANS = {"CHEST": "chest", "ABD": "abdomen", "HEAD": "head"}
REQUIRED = ("qid", "image_name", "question", "answer", "answer_type", "question_type", "image_organ", "phrase_type")
MISSING = "missing image"
TAG_REPAIRS = {"ATRIB": "ATTRIB", "PRSE": "PRES"}
ANSWER_TYPES: dict[str, AnswerType] = {"closed": "closed", "open": "open"}
PHRASES = {"freeform": False, "para": False, "test_freeform": True, "test_para": True}
"""Whether rows of a phrase type belong to the owners' test set."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A usable row of the file."""

    sample: Sample
    image: str
    case: str
    """Address of the case on MedPix; the image's name where there is none."""
    is_test: bool
    """In the owners' test set."""


@dataclass
class Reading:
    """All usable rows, and what was wrong with these and the others."""

    rows: list[Row] = field(default_factory=list)
    issues: list[RowIssue] = field(default_factory=list)
    total: int = 0
    """Rows of the file."""


def load_vqa_rad(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split.

    ``data.split: official`` is the owners' split by question, in which nearly all test images occur in training too;
    its validation split is a tenth of the training images with all their training questions. ``data.split: image``
    ignores it and puts eight tenths of the images into training and one tenth each into validation and testing, with
    all their questions and all images of the same case. ``data.seed`` decides both. Numbers of samples are limited
    last (``num_train``, ``num_val``, ``num_test``).

    Samples have the groups organ (chest, abdomen, head), family (the question type's tags, sorted and joined by "+")
    and answer_kind (yes/no or other). ``data.families`` keeps rows with any of the named tags. The notes count what
    was dropped and repaired in the whole file.

    Raises:
        ValueError: the folder or the file is missing or not VQA-RAD, all images are missing, more than
            ``data.max_dropped`` of the rows are unusable, or no question is left.
    """
    root = _root(config)
    reading = read_rows(root)
    refuse_if_too_many_dropped(
        reading.issues, total=reading.total, max_dropped=config.max_dropped, name="VQA-RAD", folder=root
    )
    rows = [row for row, place in zip(reading.rows, _places(reading.rows, config)) if place == split]
    notes = count_issues(reading.issues)
    if split == "test" and config.split == "official":
        others = {row.image for row in reading.rows if not row.is_test}
        notes["test images that also occur in train"] = len({row.image for row in rows} & others)
    kept = [row.sample for row in rows if _is_wanted(row.sample, config)]
    if not kept:
        available = sorted({tag for row in rows for tag in row.sample.groups["family"].split("+")})
        raise ValueError(
            f"No question is left in the {split} split of VQA-RAD at {root} (of {len(rows)}): data.answer_types is "
            f"{list(config.answer_types)}, and it has closed and open; data.families is {list(config.families)}, "
            f"and it has {', '.join(available) or 'none'}."
        )
    limit = {"train": config.num_train, "val": config.num_val, "test": config.num_test}[split]
    samples = tuple(kept[index] for index in choose([sample.id for sample in kept], limit, config.seed))
    if neutralised := sum(neutralise(sample.question)[1] > 0 for sample in samples):
        notes["neutralised: questions with special-token strings"] = neutralised
    return StoredDataset(f"vqa_rad/{config.split}/{split}", samples, notes, tuple(reading.issues))


def _root(config: DataConfig) -> Path:
    if config.path is None:
        raise ValueError(
            "data.path is not set, but VQA-RAD is read from a folder: set it to the one that holds its JSON."
        )
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise ValueError(f"The data folder {root} does not exist: set data.path to the folder of VQA-RAD.")
    return root


def read_rows(root: Path) -> Reading:
    """Read and check every row of the file; unusable rows are left out, counted and logged with their numbers.

    Raises:
        ValueError: the file is missing or not a list of rows, or every image is missing.
    """
    file = root / FILE
    if not file.is_file():
        raise ValueError(f"There is no file {FILE!r} in {root}: set data.path to the folder of VQA-RAD that holds it.")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"The file {file} is not JSON ({error}): download it again.") from error
    if not isinstance(content, list) or not content or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"The file {file} is not a list of questions, as VQA-RAD's is: download it again.")
    folder = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), root / IMAGE_FOLDERS[0])
    reading = Reading(total=len(content))
    problems: dict[str, str | None] = {}
    ids: set[str] = set()
    for number, fields in enumerate(content):
        found, repairs = _read_row(fields, folder, problems)
        if isinstance(found, Row) and found.sample.id in ids:
            found = "repeated qid"
        if isinstance(found, Row):
            ids.add(found.sample.id)
            reading.rows.append(found)
            reading.issues += [
                RowIssue(number, FILE, reason, "repaired", detail) for reason, detail in repairs.items()
            ]
        else:
            reading.issues.append(RowIssue(number, FILE, found, "dropped", str(fields.get("image_name", ""))))
    if problems and set(problems.values()) == {MISSING}:
        raise ValueError(
            f"Every image of VQA-RAD is missing from {folder}, {min(problems)} for example: put them there."
        )
    log_issues(reading.issues)
    return reading


def _read_row(
    fields: Mapping[str, Any], folder: Path, problems: dict[str, str | None]
) -> tuple[Row | str, dict[str, str]]:
    """A row's sample, or the reason why it is unusable; and what was repaired, with the value as it was."""
    for name in REQUIRED:
        if fields.get(name) is None:
            return f"no {name}", {}
    text = {name: " ".join(str(value).split()) for name, value in fields.items()}
    for name in ("qid", "image_name", "question", "answer"):
        if not text[name]:
            return f"empty {name}", {}
    answer_type = ANSWER_TYPES.get(text["answer_type"].lower())
    if answer_type is None:
        return "unknown answer_type", {}
    if text["phrase_type"] not in PHRASES:
        return "unknown phrase_type", {}
    image = FileImage(text["image_name"], folder)
    if image.key not in problems:
        problems[image.key] = _problem(image)
    if problem := problems[image.key]:
        return problem, {}
    tags = [tag.strip().upper() for tag in text["question_type"].split(",") if tag.strip()]
    repairs = {}
    if text["answer_type"] != fields["answer_type"]:
        repairs["blanks in answer_type"] = repr(fields["answer_type"])
    if not isinstance(fields["answer"], str):
        repairs["answer that is a number"] = text["answer"]
    if any(tag in TAG_REPAIRS for tag in tags):
        repairs["misspelt question_type"] = text["question_type"]
    sample = Sample(
        id=f"vqa_rad/{text['qid']}",
        question=text["question"],
        answer=text["answer"],
        answer_type=answer_type,
        images=(image,),
        groups={
            "organ": ORGANS.get(text["image_organ"], text["image_organ"].lower()),
            "family": "+".join(sorted({TAG_REPAIRS.get(tag, tag) for tag in tags})) or "OTHER",
            "answer_kind": "yes/no" if normalise(text["answer"]) in ("yes", "no") else "other",
        },
    )
    url = text.get("image_case_url", "")
    case = url if url.startswith("http") else image.key
    return Row(sample, image.key, case, PHRASES[text["phrase_type"]]), repairs


def _problem(image: FileImage) -> str | None:
    """What is wrong with an image file, by its header."""
    if not (image.root / image.path).is_file():
        return MISSING
    try:
        image.check()
    except ValueError as error:
        log.warning("%s", error)
        return "unreadable image"
    return None


def _places(rows: list[Row], config: DataConfig) -> list[Split]:
    """The split of every row."""
    together = connected((row.image, row.case) for row in rows)
    if config.split == "image":
        return [split_of(together[row.image], config.seed) for row in rows]
    return ["test" if row.is_test else split_of(together[row.image], config.seed, test=0.0) for row in rows]


def _is_wanted(sample: Sample, config: DataConfig) -> bool:
    tags = set(sample.groups["family"].split("+"))
    wanted = {family.upper() for family in config.families}
    return sample.answer_type in config.answer_types and (not wanted or not tags.isdisjoint(wanted))
