"""OmniMedVQA (Hu et al. 2024): multiple-choice questions from 73 data sets, in JSON files. Imports no torch.

Reads every ``*.json`` below ``QA_information/`` (or below ``data.path`` itself): an evaluation on some of the files is
an evaluation on another benchmark.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.options import find_gold, read_options
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    Unusable,
    find_images,
    is_missing,
    optional_text,
    read_groups,
    read_rows,
    required_text,
)
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.splits import Split
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, image_folder, load_split

OPTIONS = ("option_A", "option_B", "option_C", "option_D")
GROUPS = {"modality": "modality_type", "family": "question_type", "dataset": "dataset"}
KNOWN = {"question_id", "question", "gt_answer", "image_path", *OPTIONS, *GROUPS.values()}


def load_omnimed(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split. Officially all questions are test questions; ``data.split: image`` makes the other splits.

    Samples have the groups modality, family (the question type) and dataset.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "OmniMedVQA", ["**"])
    below = root / "QA_information"
    files = sorted(path for path in (below if below.is_dir() else root).rglob("*.json") if path.is_file())
    images = image_folder(root, config, ("",))
    folder = ImageFolder(images)
    cache_dir = cache_folder(config.cache_dir)

    def read(path: Path) -> Reading:
        name = path.relative_to(root).as_posix()
        return read_indexed(path, folder, f"omnimed {name}", partial(read_omnimed, path, folder, name), cache_dir)

    return load_split(Source("OmniMedVQA", {"test": files}, read, images), config, split, root)


def read_omnimed(path: Path, folder: ImageFolder, file: str) -> Reading:
    """Read one file.

    Args:
        file: name of the file in ids and issues.

    Raises:
        ValueError: the file is not a JSON list.
    """
    parse = partial(_parse, folder=folder, stem=file.removesuffix(".json"))
    return read_rows(path, parse, file=file, id_column="question_id", known=KNOWN)


def _parse(number: int, fields: Fields, repairs: Repairs, *, folder: ImageFolder, stem: str) -> Row:
    question_id = required_text(fields, "question_id", repairs)
    question = required_text(fields, "question", repairs)
    given = [name for name in OPTIONS if not is_missing(fields.get(name))]
    if given != list(OPTIONS[: len(given)]):
        raise Unusable("empty option", f"{', '.join(given)} without those before")
    options = read_options([optional_text(fields, name, repairs) for name in given], repairs)
    answer = required_text(fields, "gt_answer", repairs)
    is_letter = len(answer) == 1 and answer.casefold() not in [text.casefold() for text in options.texts]
    name = required_text(fields, "image_path", repairs)
    return Row(
        id=f"omnimed/{stem}/{question_id}",
        question=question,
        answer=find_gold(options, answer if is_letter else None, "" if is_letter else answer, {}),
        answer_type="choice",
        options=options.texts,
        images=find_images([name], folder, repairs),
        cluster=name,
        split="test",
        groups=read_groups(fields, GROUPS, repairs),
    )
