"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191) and Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923).

Images keep their aspect ratio and take a token per square of 28 x 28 pixels. The positions of image tokens have
three axes (M-RoPE). The two differ in the vision tower, which is called as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medvqa_rl.core.types import EncodedPrompt, Sample
from medvqa_rl.models.dimensions import ImageSettings, ResizedImages
from medvqa_rl.models.families.parts import Readers, backbone
from medvqa_rl.models.families.shared import SharedFamily


class Qwen2VL(SharedFamily):
    """Qwen2-VL."""

    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    processor_class = "Qwen2VLProcessor"
    image_token = placeholder = "<|image_pad|>"
    vision = ("visual",)
    projector: ClassVar[tuple[str, ...]] = ("visual.merger",)
    num_axes = 3
    pixels_per_token = 28 * 28
    patch_size = 14
    published = (56 * 56, 16384 * 28 * 28)
    """Smallest and largest area of an image in pixels, if the checkpoint does not say otherwise."""

    def load_image_processor(self, folder: Path) -> Any:
        return Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)

    def limit_pixels(self, image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
        size = {
            "shortest_edge": min_pixels or image_processor.size["shortest_edge"],
            "longest_edge": max_pixels or image_processor.size["longest_edge"],
        }
        if size["shortest_edge"] > size["longest_edge"]:
            raise ValueError(
                f"Images must have at least {size['shortest_edge']} and at most {size['longest_edge']} pixels: set "
                "model.min_pixels below model.max_pixels (they default to the checkpoint's own values)."
            )
        image_processor.size = size

    def preprocess(self, image_processor: Any, images: Sequence[Image.Image]) -> dict[str, NDArray[Any]]:
        features = image_processor(images=images, return_tensors="np")
        return {
            "pixel_values": np.ascontiguousarray(features["pixel_values"], dtype=np.float32),
            "image_grid_thw": np.asarray(features["image_grid_thw"], dtype=np.int64),
        }

    def image_lengths(self, prompt: EncodedPrompt, readers: Readers) -> list[int]:
        """An image of t x h x w patches takes t * h * w / merge_size**2 tokens."""
        if not prompt.image_inputs:
            return []
        lengths: list[int] = _lengths(prompt.image_inputs, readers.image_processor).tolist()
        return lengths

    def encode_images(
        self, ids: NDArray[np.int64], text: str, images: Sequence[Image.Image], readers: Readers
    ) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        inputs = self.preprocess(readers.image_processor, images)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == readers.image_token_id] = _lengths(inputs, readers.image_processor)
        return np.repeat(ids, repeats), inputs

    def expected_tokens(self, sample: Sample, readers: Readers) -> float:
        limits = readers.image_processor.size
        unit = readers.image_processor.patch_size * readers.image_processor.merge_size
        tokens = 0.0
        for source in sample.images:
            stored = source.header_pixels()
            pixels = min(max(stored or limits["longest_edge"], limits["shortest_edge"]), limits["longest_edge"])
            tokens += pixels / unit**2
        return tokens

    def encoding_bytes(self, sample: Sample, readers: Readers) -> int:
        """12 bytes per pixel of the stored image (Pillow's four, a copy, the array) and 72 per pixel of the resized
        one: 3 channels of 4 bytes, doubled by ``temporal_patch_size``, for the patches, the array that they are cut
        from and the copy that joins images."""
        limits = readers.image_processor.size
        total = 0
        for source in sample.images:
            stored = source.header_pixels() or 0
            seen = min(max(stored, limits["shortest_edge"]), limits["longest_edge"]) if stored else 0
            total += 12 * stored + 72 * seen
        return total

    def positions(self, prompt: EncodedPrompt, readers: Readers) -> NDArray[np.int64]:
        """(3, T) positions in time, height and width.

        Text advances all three axes by one. An image of t x h x w merged patches that starts at position p gets
        (p + time, p + row, p + column), and the text after it continues at p + max(h, w) (section 2.1).
        """
        ids = prompt.input_ids
        grids = []
        if prompt.image_inputs:
            merge = readers.image_processor.merge_size
            grids = (prompt.image_inputs["image_grid_thw"] // (1, merge, merge)).tolist()
        images = np.flatnonzero(ids == readers.image_token_id)
        assert len(images) == sum(t * h * w for t, h, w in grids), "image tokens and image grids do not match"
        positions = np.empty((3, len(ids)), dtype=np.int64)
        token, start, seen = 0, 0, 0
        for t, h, w in grids:
            first = int(images[seen])
            positions[:, token:first] = np.arange(start, start + first - token)
            start += first - token
            token, seen = first + t * h * w, seen + t * h * w
            positions[:, first:token] = np.indices((t, h, w)).reshape(3, -1) + start
            start += max(h, w)
        positions[:, token:] = np.arange(start, start + len(ids) - token)
        return positions

    def tower_modules(self, model: nn.Module) -> list[str]:
        # Not "visual" as a whole, which holds the projector.
        return ["visual.patch_embed", *(f"visual.blocks.{index}" for index in range(len(self.vision_layers(model))))]

    def vision_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = backbone(model).visual.blocks
        return layers

    def unusable(self, config: Any) -> str | None:
        if set(config.text_config.layer_types) == {"full_attention"}:
            return None
        return (
            f"uses sliding-window attention, which is not supported (no published {self.title} does): choose another "
            "model.path, or set use_sliding_window to false in its config.json."
        )

    def num_units(self, prompt: EncodedPrompt) -> int:
        return len(prompt.image_inputs["image_grid_thw"])

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        features: Sequence[Tensor] = backbone(model).get_image_features(**inputs, return_dict=True).pooler_output
        return features

    def blank_features(self, model: nn.Module, device: torch.device | str) -> Tensor:
        vision = backbone(model).config.vision_config
        side = vision.spatial_merge_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]], device=device)
        return self.encode(
            model, {"pixel_values": torch.zeros(side * side, patch, device=device), "image_grid_thw": grid}
        )[0]

    def image_rule(
        self, settings: ImageSettings, config: Mapping[str, Any], min_pixels: int | None, max_pixels: int | None
    ) -> ResizedImages:
        found = {
            "min_pixels": min_pixels or settings.size.shortest_edge or settings.min_pixels or self.published[0],
            "max_pixels": max_pixels or settings.size.longest_edge or settings.max_pixels or self.published[1],
            "patch_size": settings.patch_size or self.patch_size,
            "merge_size": settings.merge_size,
        }
        return ResizedImages(**{name: value for name, value in found.items() if value is not None})

    def patches_per_token(self, config: Any) -> int:
        merge: int = config.vision_config.spatial_merge_size
        return merge**2

    def vllm_images(self, prompt: EncodedPrompt, features: Tensor) -> dict[str, Tensor]:
        return {"image_embeds": features, "image_grid_thw": torch.from_numpy(prompt.image_inputs["image_grid_thw"])}

    def vllm_processor_arguments(self, image_processor: Any) -> dict[str, Any]:
        size = image_processor.size
        return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL."""

    title = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)

    def attention_windows(self, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        merge = vision.spatial_merge_size
        window = vision.window_size // merge // vision.patch_size * merge
        return {"window": window, "global_layers": tuple(vision.fullatt_block_indexes)}


def _lengths(image_inputs: Mapping[str, NDArray[Any]], image_processor: Any) -> NDArray[np.int64]:
    """(images,) number of tokens."""
    lengths: NDArray[np.int64] = image_inputs["image_grid_thw"].prod(axis=-1) // image_processor.merge_size**2
    return lengths
