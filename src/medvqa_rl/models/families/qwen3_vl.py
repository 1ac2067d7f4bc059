"""Qwen3-VL (dense; Qwen team 2025, arXiv 2511.21631).

Like Qwen2-VL, with squares of 32 x 32 pixels, norms of queries and keys, and DeepStack (Meng et al. 2024,
arXiv 2406.04334): features of several layers of the vision tower are added to the first layers of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medvqa_rl.models.families.parts import Embedded, backbone
from medvqa_rl.models.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Qwen3-VL. Features of an image have (1 + levels) * hidden columns: those of the input, then of each level."""

    title = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    processor_class = "Qwen3VLProcessor"
    projector = ("visual.merger", "visual.deepstack_merger_list")

    patch_size = 16
    pixels_per_token = 32 * 32
    published = (256 * 256, 4096 * 4096)

    def tower_modules(self, model: nn.Module) -> list[str]:
        return ["visual.pos_embed", *super().tower_modules(model)]

    def projector_modules(self, model: nn.Module) -> list[str]:
        levels = backbone(model).visual.deepstack_merger_list  # PEFT takes no list of modules as a whole
        return ["visual.merger", *(f"visual.deepstack_merger_list.{level}" for level in range(len(levels)))]

    def unusable(self, config: Any) -> str | None:
        return None

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        output = backbone(model).get_image_features(**inputs, return_dict=True)
        # Older versions of transformers do not split the levels by image.
        levels = [level if isinstance(level, Tensor) else torch.cat(level) for level in output.deepstack_features]
        features = torch.cat([torch.cat(output.pooler_output), *levels], dim=-1)
        images: Sequence[Tensor] = features.split([len(image) for image in output.pooler_output])
        return images

    def insert(self, embeds: Tensor, placeholders: Tensor, features: Tensor) -> Embedded:
        own, *levels = features.split(embeds.shape[-1], dim=-1)
        arguments = {"visual_pos_masks": placeholders, "deepstack_visual_embeds": levels}
        return Embedded(super().insert(embeds, placeholders, own).embeds, arguments)

    def queries_and_keys(self, attention: Any, hidden: Tensor) -> Tensor:
        states = super().queries_and_keys(attention, hidden)
        num_keys = attention.config.num_key_value_heads
        return torch.cat((attention.q_norm(states[:, :-num_keys]), attention.k_norm(states[:, -num_keys:])), dim=1)
