"""PhantomVQA: the phantom world as a data set with endless training data and fixed validation and test splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medvqa_rl.config import DataConfig
from medvqa_rl.core.randomness import Draws, address
from medvqa_rl.core.types import Sample
from medvqa_rl.data.phantom.misreadings import misread
from medvqa_rl.data.phantom.questions import FAMILIES, draw_sample
from medvqa_rl.data.phantom.world import MODALITIES, VERSION

_ENDLESS = 2**40
_SIZES = {"train": _ENDLESS, "val": 200, "test": 600}
QUESTIONS_PER_IMAGE = {"train": 1, "val": 2, "test": 2}


@dataclass(frozen=True)
class PhantomDataset:
    """Samples generated on demand; sample i is a pure function of the settings and i."""

    config: DataConfig
    split: Literal["train", "val", "test"]

    @property
    def name(self) -> str:
        return f"phantom/{self.config.scanner}/{self.split}"

    @property
    def fingerprint(self) -> str:
        config = self.config
        recipe = (VERSION, config.seed, self.split, config.scanner, *config.answer_types, *config.families)
        recipe += config.modalities
        recipe += ("wrong reasoning",) if self._is_misread else ()
        if self.split == "train" and config.home_share:
            recipe += ("home", str(config.home_share))
        return f"{address('phantom data set', *recipe, str(config.letter_skew), len(self)):016x}"

    @property
    def notes(self) -> Mapping[str, int]:
        return {}

    @property
    def is_endless(self) -> bool:
        return len(self) == _ENDLESS

    @property
    def _is_misread(self) -> bool:
        return self.config.reasoning == "wrong" and self.split == "train"

    def __len__(self) -> int:
        asked = {"train": self.config.num_train, "val": self.config.num_val, "test": self.config.num_test}
        return asked[self.split] or _SIZES[self.split]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        share = self.config.home_share if self.split == "train" else 0.0
        is_home = share > 0 and Draws("phantom home", VERSION, self.config.seed, index).chance(share)
        sample = draw_sample(
            seed=self.config.seed,
            split=self.split,
            index=index,
            scanner="home" if is_home else self.config.scanner,
            answer_types=self.config.answer_types,
            families=self.config.families or FAMILIES,
            modalities=self.config.modalities or MODALITIES,
            letter_skew=self.config.letter_skew,
            questions_per_image=QUESTIONS_PER_IMAGE[self.split],
        )
        return misread(sample) if self._is_misread else sample


def load_phantom(config: DataConfig, split: Literal["train", "val", "test"]) -> PhantomDataset:
    """Load one split of the phantom world.

    Raises:
        ValueError: a family or modality is unknown, or the families have no questions of the allowed answer types.
    """
    for name, asked, known in (("families", config.families, FAMILIES), ("modalities", config.modalities, MODALITIES)):
        if unknown := [word for word in asked if word not in known]:
            raise ValueError(
                f"data.{name} names {', '.join(unknown)}, which the phantom world does not have: "
                f"choose from {', '.join(known)}."
            )
    dataset = PhantomDataset(config, split)
    dataset[0]  # fail now, not during the run, if the families have no questions of these answer types
    return dataset
