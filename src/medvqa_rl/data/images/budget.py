"""Number of image tokens that an image takes. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import local_file
from medvqa_rl.core.files import read_json

Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class ImageBudget:
    """Image size limits of a Qwen2-VL processor, which determine the number of image tokens."""

    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28
    patch_size: int = 14
    merge_size: int = 2

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels after resizing: multiples of patch_size * merge_size, with an area between
        min_pixels and max_pixels and nearly the same aspect ratio. Same arithmetic as ``smart_resize`` in Qwen2-VL's
        processor (Wang et al. 2024).

        Raises:
            ValueError: one side is more than 200 times the other, which the processor rejects.
        """
        if max(width, height) > 200 * min(width, height):
            raise ValueError(
                f"One side of the {width} x {height} image is more than 200 times the other, which Qwen2-VL rejects: "
                "crop the image."
            )
        unit = self.patch_size * self.merge_size
        rounded = (round(width / unit) * unit, round(height / unit) * unit)
        if rounded[0] * rounded[1] > self.max_pixels:
            scale = math.sqrt(width * height / self.max_pixels)
            return (
                max(unit, math.floor(width / scale / unit) * unit),
                max(unit, math.floor(height / scale / unit) * unit),
            )
        if rounded[0] * rounded[1] < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (width * height))
            return math.ceil(width * scale / unit) * unit, math.ceil(height * scale / unit) * unit
        return rounded

    def tokens(self, width: int, height: int) -> int:
        """Number of image tokens: one per square of patch_size * merge_size pixels.

        Raises:
            ValueError: as :meth:`resized`.
        """
        unit = self.patch_size * self.merge_size
        across, down = self.resized(width, height)
        return (across // unit) * (down // unit)


class _Size(BaseModel):
    shortest_edge: Positive | None = None
    longest_edge: Positive | None = None


class _Preprocessor(BaseModel):
    """What is read of a preprocessor_config.json."""

    size: _Size | None = None
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    patch_size: Positive | None = None
    merge_size: Positive | None = None


_PREPROCESSOR = TypeAdapter(_Preprocessor)


def image_budget(model: ModelConfig) -> tuple[ImageBudget, str]:
    """Image size limits of a model, and their source in words.

    The limits are read from the checkpoint's preprocessor_config.json if it is available locally (a folder, an
    embedded model or the Hub cache) and default to those published with Qwen2-VL. ``model.min_pixels`` and
    ``model.max_pixels`` override both. Never uses the network.

    Raises:
        ValueError: the file is damaged.
    """
    file = local_file(model.path, model.revision, "preprocessor_config.json")
    values: dict[str, int] = {}
    where = "as published with Qwen2-VL"
    if file is not None:
        where = f"from {model.path}"
        content = read_json(_PREPROCESSOR, file, "copy the file from the checkpoint")
        size = content.size or _Size()
        found = {
            "min_pixels": size.shortest_edge or content.min_pixels,
            "max_pixels": size.longest_edge or content.max_pixels,
            "patch_size": content.patch_size,
            "merge_size": content.merge_size,
        }
        values = {name: value for name, value in found.items() if value is not None}
    given = {"min_pixels": model.min_pixels, "max_pixels": model.max_pixels}
    values |= {name: value for name, value in given.items() if value is not None}
    return ImageBudget(**values), where
