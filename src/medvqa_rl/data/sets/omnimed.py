"""OmniMedVQA (Hu et al. 2024) and files like its own: choice questions of many data sets, in JSON lists.

Every ``*.json`` below ``QA_information/`` (or below ``data.path`` itself) is read, without exception: harnesses that
read some of the files report numbers of another benchmark. Imports no torch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    Unusable,
    find_gold,
    images_of,
    is_missing,
    optional_text,
    read_options,
    read_rows,
    text_of,
)
from medvqa_rl.data.reading.tables import Fields
from medvqa_rl.data.splits import Split, StoredDataset
from medvqa_rl.data.stored import SPLITS, Source, data_folder, load_split

OPTIONS = ("option_A", "option_B", "option_C", "option_D")


def load_omnimed(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split. Officially all questions are for testing; ``data.split: image`` makes training and validation
    splits. Samples have the groups modality, family (the question type) and dataset.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "OmniMedVQA", ["**"])
    below = root / "QA_information"
    files = sorted(path for path in (below if below.is_dir() else root).rglob("*.json") if path.is_file())
    images = root / config.image_folder if config.image_folder is not None else root
    folder = ImageFolder(images)
    cache_dir = cache_folder(config.cache_dir)

    def read(path: Path) -> Reading:
        name = path.relative_to(root).as_posix()
        return read_indexed(path, folder, f"omnimed {name}", partial(read_omnimed, path, folder, name), cache_dir)

    source = Source(
        title="OmniMedVQA",
        files={"test": files},
        read=read,
        images=images,
        names={place: f"omnimed/official/{place}" for place in SPLITS},
    )
    return load_split(source, config, split, root)


def read_omnimed(path: Path, folder: ImageFolder, file: str) -> Reading:
    """Read one file.

    Raises:
        ValueError: it is not a JSON list.
    """
    ids: set[str] = set()
    return read_rows(path, partial(_parse, folder=folder, file=file, ids=ids), file=file)


def _parse(number: int, fields: Fields, repairs: Repairs, *, folder: ImageFolder, file: str, ids: set[str]) -> Row:
    question_id = text_of(fields, "question_id", repairs)
    question = text_of(fields, "question", repairs)
    given = [name for name in OPTIONS if not is_missing(fields.get(name))]
    if given != list(OPTIONS[: len(given)]):
        raise Unusable("empty option", f"{', '.join(given)} without those before")
    options = read_options([optional_text(fields, name, repairs) for name in given], repairs)
    answer = text_of(fields, "gt_answer", repairs)
    number_of = [text.casefold() for text in options.texts].count(answer.casefold())
    is_letter = len(answer) == 1 and not number_of
    gold = find_gold(options, answer if is_letter else None, "" if is_letter else answer, {})
    name = text_of(fields, "image_path", repairs)
    row = Row(
        id=f"omnimed/{file.removesuffix('.json')}/{question_id}",
        question=question,
        answer=gold,
        answer_type="choice",
        options=options.texts,
        images=images_of([name], folder, repairs),
        together=name,
        place="test",
        groups={
            group: text
            for group, column in (("modality", "modality_type"), ("family", "question_type"), ("dataset", "dataset"))
            if (text := optional_text(fields, column, repairs))
        },
    )
    if question_id in ids:
        raise Unusable("repeated question_id", question_id)
    ids.add(question_id)
    return row
