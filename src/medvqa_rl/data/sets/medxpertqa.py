"""MedXpertQA MM (Zuo et al. 2025, arXiv 2501.18362): questions of medical boards with five options and one or more
images, as a test set. Imports no torch.

Reads ``MM/test.jsonl``. A question repeats its options at its end ("Answer Choices: (A) ..."), which are removed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.text import normalise
from medvqa_rl.data.reading.cells import image_cells, option_cells
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.options import find_gold, read_options, split_options
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    find_images,
    read_groups,
    read_rows,
    required_text,
)
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.splits import Split
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, image_folder, load_split

GROUPS = {"family": "medical_task", "organ": "body_system", "question_type": "question_type"}
KNOWN = {"id", "question", "options", "label", "images", *GROUPS.values()}


def load_medxpertqa(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split. Officially all questions are test questions; ``data.split: image`` makes the other splits.

    Samples have the groups family (the medical task), organ (the body system) and question_type (reasoning or
    understanding).

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "MedXpertQA", ["**"])
    images = image_folder(root, config, ("images", ""))
    file = next((path for path in (root / "MM" / "test.jsonl", root / "test.jsonl") if path.is_file()), None)
    folder = ImageFolder(images)
    files: dict[Split, list[Path]] = {} if file is None else {"test": [file]}
    source = Source("MedXpertQA MM", files, partial(read_medxpertqa, folder=folder), images)
    return load_split(source, config, split, root)


def read_medxpertqa(path: Path, folder: ImageFolder) -> Reading:
    """Read one file.

    Raises:
        ValueError: the file cannot be read.
    """
    return read_rows(path, partial(_parse, folder=folder), known=KNOWN)


def _parse(number: int, fields: Fields, repairs: Repairs, *, folder: ImageFolder) -> Row:
    question = required_text(fields, "question", repairs)
    options = read_options(option_cells(fields, repairs), repairs)
    found = split_options(question)
    if found and [*map(normalise, found[1])] == [*map(normalise, options.texts)]:
        question = found[0]
    images = find_images([str(cell) for cell in image_cells(fields, repairs)], folder, repairs)
    return Row(
        id=f"medxpertqa/{required_text(fields, 'id', repairs)}",
        question=question,
        answer=find_gold(options, required_text(fields, "label", repairs), "", repairs),
        answer_type="choice",
        options=options.texts,
        images=images,
        cluster=images[0],
        split="test",
        groups=read_groups(fields, GROUPS, repairs),
    )
