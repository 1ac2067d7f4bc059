"""How many image tokens an image costs. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import ASSETS


@dataclass(frozen=True)
class ImageBudget:
    """How a Qwen2-VL processor resizes images."""

    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28
    patch_size: int = 14
    merge_size: int = 2

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels after resizing: multiples of patch_size * merge_size, the area within the limits,
        the ratio nearly kept. The arithmetic of Qwen2-VL (Wang et al. 2024, ``smart_resize`` of its processor).

        Raises:
            ValueError: one side is more than 200 times the other; the processor refuses such images.
        """
        if max(width, height) > 200 * min(width, height):
            raise ValueError(
                f"An image of {width} x {height} pixels is more than 200 times as long as wide, which Qwen2-VL "
                "refuses: crop it."
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
        """Image tokens that the language model reads for an image: one per unit of patch_size * merge_size pixels
        squared.

        Raises:
            ValueError: as :meth:`resized`.
        """
        unit = self.patch_size * self.merge_size
        across, down = self.resized(width, height)
        return (across // unit) * (down // unit)


def image_budget(model: ModelConfig) -> tuple[ImageBudget, str]:
    """How the model of the settings resizes images, and where that is known from.

    Values come from the checkpoint's preprocessor_config.json where it is on this machine (a folder, the embedded
    models or the Hub's cache), else they are those published with Qwen2-VL; the settings' min_pixels and max_pixels
    win. Opens no connection.

    Raises:
        ValueError: the file is damaged.
    """
    folder = Path(model.path).expanduser()
    if model.path.startswith("phantom:"):
        folder = ASSETS / model.path.removeprefix("phantom:")
    file: Path | None = folder / "preprocessor_config.json"
    if not folder.is_dir() and model.path.count("/") == 1:
        cached = try_to_load_from_cache(model.path, "preprocessor_config.json", revision=model.revision)
        file = Path(cached) if isinstance(cached, str) else None
    values: dict[str, int] = {}
    where = "as published with Qwen2-VL"
    if file is not None and file.is_file():
        where = f"of {model.path}"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            size = content.get("size") or {}
            found = {
                "min_pixels": size.get("shortest_edge", content.get("min_pixels")),
                "max_pixels": size.get("longest_edge", content.get("max_pixels")),
                "patch_size": content.get("patch_size"),
                "merge_size": content.get("merge_size"),
            }
            values = {name: int(value) for name, value in found.items() if value is not None}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The file {file} is no image settings ({error}): take it from the checkpoint."
            ) from error
    given = {"min_pixels": model.min_pixels, "max_pixels": model.max_pixels}
    values |= {name: value for name, value in given.items() if value is not None}
    return ImageBudget(**values), where
