"""Data sets: questions, images and gold answers. Imports no torch."""

from __future__ import annotations

from medvqa_rl.config import DataConfig
from medvqa_rl.core.types import Dataset
from medvqa_rl.data.splits import SPLITS, Split

__all__ = ["Split", "load_dataset", "load_splits"]


def load_dataset(config: DataConfig, split: Split) -> Dataset:
    """Load one split of the data set ``data.name``.

    Raises:
        ValueError: the data is missing or unreadable, too many rows are unusable, or no question is left.
    """
    match config.name:
        case "phantom":
            from medvqa_rl.data.phantom.dataset import load_phantom

            return load_phantom(config, split)
        case "vqa_rad":
            from medvqa_rl.data.sets.vqa_rad import load_vqa_rad

            return load_vqa_rad(config, split)
        case "pmc_vqa":
            from medvqa_rl.data.sets.pmc_vqa import load_pmc_vqa

            return load_pmc_vqa(config, split)
        case "slake_en" | "slake_zh":
            from medvqa_rl.data.sets.slake import load_slake

            return load_slake(config, split)
        case "path_vqa" | "vqa_rad_hub":
            from medvqa_rl.data.sets.path_vqa import load_image_parquet

            return load_image_parquet(config, split)
        case "vqa_med":
            from medvqa_rl.data.sets.vqa_med import load_vqa_med

            return load_vqa_med(config, split)
        case "omnimed":
            from medvqa_rl.data.sets.omnimed import load_omnimed

            return load_omnimed(config, split)
        case "med_r1":
            from medvqa_rl.data.sets.med_r1 import load_med_r1

            return load_med_r1(config, split)
        case "medxpertqa":
            from medvqa_rl.data.sets.medxpertqa import load_medxpertqa

            return load_medxpertqa(config, split)
        case "mmmu_medical":
            from medvqa_rl.data.sets.mmmu import load_mmmu

            return load_mmmu(config, split)
        case "own":
            from medvqa_rl.data.sets.own import load_own

            return load_own(config, split)


def load_splits(config: DataConfig) -> dict[str, Dataset]:
    """Load all splits that a data set has, in the order train, val, test.

    Raises:
        ValueError: the data is missing or unreadable, or has no split.
    """
    from medvqa_rl.data.stored import NoSuchSplit

    found: dict[str, Dataset] = {}
    missing: list[NoSuchSplit] = []
    for split in SPLITS:
        try:
            found[split] = load_dataset(config, split)
        except NoSuchSplit as error:
            missing.append(error)
    if not found:
        raise missing[0]
    return found
