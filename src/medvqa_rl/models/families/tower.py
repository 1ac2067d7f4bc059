"""The vision tower of a Qwen2-VL without its language model, for models that only look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from medvqa_rl.models.families.parts import backbone


class VisionTower(nn.Module):
    """A tower and its projector, with the image processor that feeds them."""

    def __init__(self, tower: Any, image_processor: Any) -> None:
        super().__init__()
        self.tower, self._image_processor = tower, image_processor

    @property
    def width(self) -> int:
        """Of a token."""
        return int(self.tower.config.hidden_size)

    def forward(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, T, width) tokens of images of one size."""
        inputs = self._image_processor(images=list(images), return_tensors="pt")
        pixels = inputs["pixel_values"].to(next(self.tower.parameters()).dtype)
        found = self.tower(pixels, grid_thw=inputs["image_grid_thw"], return_dict=True)
        tokens: Tensor = found.pooler_output
        return tokens.view(len(images), -1, self.width)

    def save(self, folder: Path) -> None:
        """Save the weights and the image settings."""
        self.tower.save_pretrained(folder)
        self._image_processor.save_pretrained(folder)


def tower_of(model: nn.Module, image_processor: Any) -> VisionTower:
    """The tower of a whole model, with which it shares its weights."""
    return VisionTower(backbone(model).visual, image_processor)


def load_tower(folder: Path) -> VisionTower:
    """Load a saved tower in float32; opens no connection."""
    tower = Qwen2VisionTransformerPretrainedModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return VisionTower(tower, Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True))
