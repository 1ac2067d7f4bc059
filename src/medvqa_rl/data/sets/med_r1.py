"""The splits of OmniMedVQA that Med-R1 trains and tests on (Lai et al. 2025, arXiv 2503.13939). Imports no torch.

``data.path`` is the folder with ``train/`` and ``test/``, such as ``Splits/modality``, each with a JSON file for every
modality (or task). A record has ``image``, ``problem``, which ends in the options, and ``solution``, the letter in
answer tags. The images are those of OmniMedVQA.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.data.reading.cells import without_tags
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.options import as_letter, find_gold, read_options, split_options
from medvqa_rl.data.reading.rows import Reading, Repairs, Row, Unusable, find_images, read_rows, required_text
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.splits import SPLITS, Split
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, image_folder, load_split

KNOWN = ("image", "problem", "solution")


def load_med_r1(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split; a tenth of the training images is the validation split.

    Samples have the group family, the modality or task that their file is named after.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "Med-R1's splits", ["**"])
    beside = [name for name in ("", "..", "../..") if (root / name / "Images").is_dir()]
    images = image_folder(root, config, beside or ["../../Images"])
    folder = ImageFolder(images)
    found: dict[Split, list[Path]] = {name: sorted(root.glob(f"{name}/*.json")) for name in SPLITS}
    files = {name: paths for name, paths in found.items() if paths}
    cache_dir = cache_folder(config.cache_dir)

    def read(path: Path) -> Reading:
        name = path.relative_to(root).as_posix()
        return read_indexed(path, folder, f"med_r1 {name}", partial(read_med_r1, path, folder), cache_dir)

    source = Source("Med-R1's splits", files, read, images, val_from_train="val" not in files)
    return load_split(source, config, split, root)


def read_med_r1(path: Path, folder: ImageFolder) -> Reading:
    """Read one file.

    Raises:
        ValueError: the file is not a JSON list.
    """
    name = f"{path.parent.name}/{path.name}"
    parse = partial(_parse, folder=folder, file=name, split=path.parent.name)
    return read_rows(path, parse, file=name, known=KNOWN)


def _parse(number: int, fields: Fields, repairs: Repairs, *, folder: ImageFolder, file: str, split: str) -> Row:
    found = split_options(required_text(fields, "problem", repairs))
    if found is None:
        raise Unusable("no options in the problem")
    question, cells = found
    options = read_options(cells, repairs)
    answer = without_tags(required_text(fields, "solution", repairs))[0]
    letter = as_letter(answer)
    images = find_images([required_text(fields, "image", repairs)], folder, repairs)
    stem = Path(file).stem
    return Row(
        id=f"med_r1/{split}/{stem}/{number}",
        question=question,
        answer=find_gold(options, letter or None, "" if letter else answer, repairs),
        answer_type="choice",
        options=options.texts,
        images=images,
        cluster=images[0],
        split=split,
        groups={"family": re.sub(r"_(?:train|test)$", "", stem)},
    )
