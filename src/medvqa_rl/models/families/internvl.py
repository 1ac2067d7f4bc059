"""InternVL3 and InternVL3.5 (Zhu et al. 2025, arXiv 2504.10479; Wang et al. 2025, arXiv 2508.18265) as transformers
has them, in checkpoints whose names end in ``-hf``.

An image is cut into up to 12 square tiles, as its aspect ratio suggests, and a thumbnail follows if there are several.
The vision tower sees each tile alone. A tile has a fixed number of tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from medvqa_rl.core.types import EncodedPrompt, Sample
from medvqa_rl.models.dimensions import ImageSettings, ImageSize
from medvqa_rl.models.families.parts import Readers, backbone
from medvqa_rl.models.families.shared import SharedFamily

PROCESSOR_FILE = "processor_config.json"
TILE_TOKENS = 256
"""Tokens of a tile, if the checkpoint does not say otherwise."""
_DEFAULTS: dict[str, Any] = {
    "size": {"height": 448, "width": 448},
    "min_patches": 1,
    "max_patches": 12,
    "crop_to_patches": True,
    "use_thumbnail": True,
}
"""Published image settings."""
_START, _END = "<img>", "</img>"
"""Tokens around the tiles of an image."""


@dataclass(frozen=True)
class TiledImages:
    """Images that are cut into square tiles."""

    image_processor: Any
    patches: int
    """Patches along a side of a tile."""
    tile_tokens: int

    @property
    def rule(self) -> str:
        side, most = self.image_processor.size["height"], self.image_processor.max_patches
        return (
            f"Images are cut into up to {most} tiles of {side} x {side} pixels, with a thumbnail beside several; each "
            f"takes {self.tile_tokens} tokens"
        )

    def size(self, width: int, height: int) -> ImageSize:
        """The cost of an image."""
        tiles = self.image_processor.get_number_of_image_patches(height, width)
        return ImageSize(((self.patches, self.patches),) * tiles, tiles * self.tile_tokens)

    def tokens(self, width: int, height: int) -> int:
        """Number of image tokens."""
        return self.size(width, height).tokens


class InternVL(SharedFamily):
    """InternVL with a Qwen2 or Qwen3 language model."""

    title = "InternVL"
    model_types = ("internvl",)
    processor_class = "InternVLProcessor"
    pixels_per_token = 448 * 448 // 256
    image_token = placeholder = "<IMG_CONTEXT>"
    has_vllm = False

    def load_image_processor(self, folder: Path) -> Any:
        image_processor: Any = GotOcr2ImageProcessorPil.from_pretrained(folder, local_files_only=True)
        # The stock processor asks for tiles, whatever preprocessor_config.json says.
        image_processor.crop_to_patches = True
        settings = folder / PROCESSOR_FILE
        stored = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
        image_processor.image_seq_length = int(stored.get("image_seq_length", TILE_TOKENS))
        return image_processor

    def save_image_processor(self, image_processor: Any, folder: Path) -> None:
        super().save_image_processor(image_processor, folder)
        settings = {"processor_class": self.processor_class, "image_seq_length": image_processor.image_seq_length}
        (folder / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def limit_pixels(self, image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
        """The limits are of the tiles, without the thumbnail."""
        area = _area(image_processor)
        if max_pixels is not None and max_pixels < area:
            raise ValueError(
                f"model.max_pixels is {max_pixels}, but this {self.title} sees an image as tiles of {area} pixels: "
                "set it to that for one tile, or to a multiple for more."
            )
        least = image_processor.min_patches if min_pixels is None else math.ceil(min_pixels / area)
        most = image_processor.max_patches if max_pixels is None else max_pixels // area
        if least > most:
            raise ValueError(
                f"Images must have at least {least} and at most {most} tiles of {area} pixels: set model.min_pixels "
                "below model.max_pixels (they default to the checkpoint's own values)."
            )
        image_processor.min_patches, image_processor.max_patches = least, most

    def preprocess(self, image_processor: Any, images: Sequence[Image.Image]) -> dict[str, NDArray[Any]]:
        return _tiles(image_processor, images)[0]

    def encode_images(
        self, ids: NDArray[np.int64], text: str, images: Sequence[Image.Image], readers: Readers
    ) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        """A placeholder becomes the tokens of all tiles of its image between two further tokens."""
        inputs, counts = _tiles(readers.image_processor, images)
        start, end = readers.tokenizer.convert_tokens_to_ids([_START, _END])
        pieces: list[NDArray[np.int64]] = []
        first = 0
        for place, count in zip(np.flatnonzero(ids == readers.image_token_id).tolist(), counts, strict=True):
            tokens = np.full(count * readers.image_processor.image_seq_length, readers.image_token_id)
            pieces += [ids[first:place], np.array([start]), tokens, np.array([end])]
            first = place + 1
        return np.concatenate([*pieces, ids[first:]]), inputs

    def image_lengths(self, prompt: EncodedPrompt, readers: Readers) -> list[int]:
        """All tiles of an image stand side by side, and other tokens stand between images."""
        places = np.flatnonzero(prompt.input_ids == readers.image_token_id)
        images = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        return [len(image) for image in images if len(image)]

    def expected_tokens(self, sample: Sample, readers: Readers) -> float:
        """As for square images of the same area."""
        processor = readers.image_processor
        tiles = 0
        for source in sample.images:
            side = math.isqrt(source.header_pixels() or 0)
            tiles += processor.get_number_of_image_patches(side, side) if side else processor.max_patches + 1
        return float(tiles * processor.image_seq_length)

    def encoding_bytes(self, sample: Sample, readers: Readers) -> int:
        """12 bytes per pixel of the stored image (Pillow's four, a copy, the array) and 51 per pixel of the tiles: the
        resized image, and four arrays of 3 channels of 4 bytes (rescaled, normalised, joined, copied)."""
        tiles = _area(readers.image_processor) * (readers.image_processor.max_patches + 1)
        stored = [source.header_pixels() or 0 for source in sample.images]
        return sum(12 * pixels + 51 * tiles for pixels in stored if pixels)

    def vision_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = backbone(model).vision_tower.encoder.layer
        return layers

    def unusable(self, config: Any) -> str | None:
        text = config.text_config
        if text.model_type not in ("qwen2", "qwen3"):
            return (
                f"is an {self.title} with a {text.model_type} language model, but only Qwen2 and Qwen3 are supported "
                "as its language model: choose another model.path."
            )
        if set(text.layer_types) == {"full_attention"}:
            return None
        return (
            f"uses sliding-window attention, which is not supported (no published {self.title} does): choose another "
            "model.path, or set use_sliding_window to false in its config.json."
        )

    def image_rule(
        self, settings: ImageSettings, config: Mapping[str, Any], min_pixels: int | None, max_pixels: int | None
    ) -> TiledImages:
        given: dict[str, Any] = {"min_patches": settings.min_patches, "max_patches": settings.max_patches}
        if settings.size.height is not None:
            given["size"] = {"height": settings.size.height, "width": settings.size.height}
        processor = GotOcr2ImageProcessorPil(**_DEFAULTS | {name: value for name, value in given.items() if value})
        self.limit_pixels(processor, min_pixels, max_pixels)
        vision = config.get("vision_config") or {}
        patch = vision.get("patch_size", 14)
        patch = patch[0] if isinstance(patch, list) else patch
        return TiledImages(processor, processor.size["height"] // patch, config.get("image_seq_length", TILE_TOKENS))

    def patches_per_token(self, config: Any) -> int:
        """Neighbouring patches are joined by pixel shuffle."""
        patches: int = round((1 / config.downsample_ratio) ** 2)
        return patches

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        features: Tensor = backbone(model).get_image_features(**inputs, return_dict=True).pooler_output
        return tuple(features)

    def blank_features(self, model: nn.Module, device: torch.device | str) -> Tensor:
        vision = backbone(model).config.vision_config
        tile = torch.zeros(1, vision.num_channels, *vision.image_size, device=device)
        return self.encode(model, {"pixel_values": tile})[0]

    def queries_and_keys(self, attention: Any, hidden: Tensor) -> Tensor:
        states = super().queries_and_keys(attention, hidden)
        if attention.config.model_type == "qwen2":
            return states
        num_keys = attention.config.num_key_value_heads
        return torch.cat((attention.q_norm(states[:, :-num_keys]), attention.k_norm(states[:, -num_keys:])), dim=1)


def _tiles(image_processor: Any, images: Sequence[Image.Image]) -> tuple[dict[str, NDArray[Any]], list[int]]:
    """The image inputs, and the number of tiles of each image."""
    features = image_processor(images=images, return_tensors="np")
    pixels = np.ascontiguousarray(features["pixel_values"], dtype=np.float32)
    return {"pixel_values": pixels}, [int(count) for count in features["num_patches"]]


def _area(image_processor: Any) -> int:
    """Pixels of a tile."""
    area: int = image_processor.size["height"] * image_processor.size["width"]
    return area
