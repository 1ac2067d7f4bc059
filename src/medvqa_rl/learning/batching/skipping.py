"""Leave damaged images out of training without changing which questions the other draws get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from medvqa_rl.core.text import first_few
from medvqa_rl.core.types import Dataset, Sample


@dataclass(frozen=True)
class WithoutImages:
    """A data set in which the next usable question takes the place of each question about a skipped image.

    Positions stay the same, so every other draw of a resumed run is that of the uninterrupted one. The fingerprint is
    that of the whole data set.
    """

    base: Dataset
    usable: Sequence[int]
    """For every index, that of the question to ask."""

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def fingerprint(self) -> str:
        return self.base.fingerprint

    @property
    def notes(self) -> Mapping[str, int]:
        replaced = sum(index != used for index, used in enumerate(self.usable))
        return {**self.base.notes, "questions replaced because of data.skip_images": replaced}

    @property
    def is_endless(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Sample:
        used = self.usable[index]
        sample = self.base[used]
        if used == index:
            return sample
        # An id of its own: the question may be drawn in its own place in the same step, and must sample other tokens.
        return replace(sample, id=f"{sample.id} in place of {self.base[index].id}")


def without_images(dataset: Dataset, skipped: Sequence[str]) -> Dataset:
    """Leave images out of a training set, by key.

    Raises:
        ValueError: no question is about one of them, or every question is.
    """
    if not skipped:
        return dataset
    keys = [{image.key for image in dataset[index].images} for index in range(len(dataset))]
    if unknown := [name for name in skipped if not any(name in own for own in keys)]:
        raise ValueError(
            f"data.skip_images names {first_few(map(repr, unknown))}, but no training question is about it: give the "
            "path of the image as the data set writes it, such as images/a.png."
        )
    is_usable = [own.isdisjoint(skipped) for own in keys]
    if not any(is_usable):
        raise ValueError("data.skip_images leaves out the images of all training questions: name fewer.")
    last = next(index for index, usable in enumerate(is_usable) if usable)  # the one after the end
    chosen = []
    for index in reversed(range(len(keys))):
        last = index if is_usable[index] else last
        chosen.append(last)
    return WithoutImages(dataset, chosen[::-1])
