"""VQA-RAD (Lau et al. 2018, CC0): questions of clinicians about radiology images, read as its owners publish it.

The folder holds ``VQA_RAD Dataset Public.json`` and the images in ``images/`` (or ``VQA_RAD Image Folder/``, as in the
owners' archive). Imports no torch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.text import neutralise, normalise
from medvqa_rl.core.types import AnswerType, Sample
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.reading.folder import MISSING, ImageFolder
from medvqa_rl.data.reading.issues import RowIssue, count_issues, log_issues, refuse_if_too_many_dropped
from medvqa_rl.data.reading.rows import Repairs, Unusable, is_missing, optional_text, text_of
from medvqa_rl.data.reading.tables import Fields, Report, read_table
from medvqa_rl.data.splits import Split, StoredDataset, choose, connected, split_of

FILE = "VQA_RAD Dataset Public.json"
IMAGE_FOLDERS = ("images", "VQA_RAD Image Folder")

ORGANS = {"CHEST": "chest", "ABD": "abdomen", "HEAD": "head"}
REQUIRED = ("qid", "image_name", "question", "answer", "answer_type", "question_type", "image_organ", "phrase_type")
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
    reading = read_rows(root, config.image_folder)
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


def read_rows(root: Path, image_folder: str | None = None) -> Reading:
    """Read and check every row of the file; unusable rows are left out, counted and logged with their numbers.

    Args:
        root: the data set's folder.
        image_folder: the folder of the images below it; None finds the usual ones.

    Raises:
        ValueError: the file is missing or not a list of rows, or every image is missing.
    """
    file = root / FILE
    if not file.is_file():
        raise ValueError(f"There is no file {FILE!r} in {root}: set data.path to the folder of VQA-RAD that holds it.")
    names = IMAGE_FOLDERS if image_folder is None else (image_folder,)
    images = next((root / name for name in names if (root / name).is_dir()), root / names[0])
    folder = ImageFolder(images)
    report = Report(FILE)
    rows: list[Row] = []
    problems: dict[str, str] = {}
    ids: set[str] = set()
    for number, fields in read_table(file, report):
        repairs: Repairs = {}
        try:
            row = _read_row(fields, repairs, folder, images, problems)
            if row.sample.id in ids:
                raise Unusable("repeated qid", row.sample.id)
        except Unusable as problem:
            report.drop(number, problem.reason, problem.detail)
            continue
        ids.add(row.sample.id)
        rows.append(row)
        for reason, was in repairs.items():
            report.repair(number, reason, was)
    if problems and set(problems.values()) == {MISSING}:
        raise ValueError(
            f"Every image of VQA-RAD is missing from {images}, {min(problems)} for example: put them there."
        )
    log_issues(report.issues)
    return Reading(rows, report.issues, report.total)


def _read_row(fields: Fields, repairs: Repairs, folder: ImageFolder, images: Path, problems: dict[str, str]) -> Row:
    """A row's sample.

    Raises:
        Unusable: the row cannot be used.
    """
    for name in REQUIRED:
        if is_missing(fields.get(name)):
            raise Unusable(f"no {name}")
    by_design: Repairs = {}  # the owners' ids are numbers
    qid = text_of(fields, "qid", by_design)
    name, question, answer = (text_of(fields, key, by_design) for key in ("image_name", "question", "answer"))
    kind, phrase, types, organ = (
        optional_text(fields, key, by_design) for key in ("answer_type", "phrase_type", "question_type", "image_organ")
    )
    answer_type = ANSWER_TYPES.get(kind.lower())
    if answer_type is None:
        raise Unusable("unknown answer_type", kind)
    if phrase not in PHRASES:
        raise Unusable("unknown phrase_type", phrase)
    if name not in problems:
        problems[name] = _problem(name, folder, images)
    if problems[name]:
        raise Unusable(problems[name], name)
    tags = [tag.strip().upper() for tag in types.split(",") if tag.strip()]
    if kind != fields["answer_type"]:
        repairs["blanks in answer_type"] = repr(fields["answer_type"])
    if not isinstance(fields["answer"], str):
        repairs["answer that is a number"] = answer
    if any(tag in TAG_REPAIRS for tag in tags):
        repairs["misspelt question_type"] = types
    image = FileImage(folder.find(name)[0], images)
    sample = Sample(
        id=f"vqa_rad/{qid}",
        question=question,
        answer=answer,
        answer_type=answer_type,
        images=(image,),
        groups={
            "organ": ORGANS.get(organ, organ.lower()),
            "family": "+".join(sorted({TAG_REPAIRS.get(tag, tag) for tag in tags})) or "OTHER",
            "answer_kind": "yes/no" if normalise(answer) in ("yes", "no") else "other",
        },
    )
    url = optional_text(fields, "image_case_url", by_design)
    return Row(sample, image.key, url if url.startswith("http") else image.key, PHRASES[phrase])


def _problem(name: str, folder: ImageFolder, images: Path) -> str:
    """What is wrong with an image: with its path, or with the header of its file; "" where nothing is."""
    path, problem = folder.find(name)
    if problem:
        return problem
    try:
        FileImage(path, images).check()
    except ValueError as error:
        log.warning("%s", error)
        return "unreadable image"
    return ""


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
