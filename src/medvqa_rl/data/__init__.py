"""Data sets: where questions, images and gold answers come from. Imports no torch."""

from __future__ import annotations

from medvqa_rl.config import DataConfig
from medvqa_rl.data.splits import Split
from medvqa_rl.types import Dataset

__all__ = ["Split", "load_dataset"]


def load_dataset(config: DataConfig, split: Split) -> Dataset:
    """Load one split of the data set that the settings name.

    Raises:
        ValueError: the data cannot be found or read, too many rows are unusable, or no question is left.
    """
    match config.name:
        case "phantom":
            from medvqa_rl.data.phantom import load_phantom

            return load_phantom(config, split)
        case "vqa_rad":
            from medvqa_rl.data.vqa_rad import load_vqa_rad

            return load_vqa_rad(config, split)
