"""Gemma 3 (Gemma Team 2025, arXiv 2503.19786) and MedGemma, which is built on it.

Every image is resized to one square and takes the same number of tokens, which attend to each other in both
directions. Most layers have a sliding window, and rotary embeddings of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from medvqa_rl.core.progress import to_stderr
from medvqa_rl.core.types import EncodedPrompt, Sample
from medvqa_rl.models.dimensions import FixedImages, ImageSettings
from medvqa_rl.models.families.parts import Readers, backbone
from medvqa_rl.models.families.shared import SLIDING, SharedFamily

_END_OF_IMAGE = "<end_of_image>"


class Gemma3(SharedFamily):
    """Gemma 3 and MedGemma, those that see."""

    title = "Gemma 3"
    model_types = ("gemma3",)
    processor_class = "Gemma3Processor"
    image_token = "<image_soft_token>"
    placeholder = "<start_of_image>"
    end_of_turn = "<end_of_turn>"
    is_bidirectional = True
    has_vllm = False  # it takes no features of images for this model

    def load_image_processor(self, folder: Path) -> Any:
        image_processor: Any = Gemma3ImageProcessorPil.from_pretrained(folder, local_files_only=True)
        if image_processor.do_pan_and_scan:
            to_stderr(
                f"{folder} switches pan-and-scan on, which adds crops of an image: it is used with whole images only."
            )
            image_processor.do_pan_and_scan = False
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        image_processor.image_seq_length = settings.get("mm_tokens_per_image", 256)
        return image_processor

    def limit_pixels(self, image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
        if min_pixels is not None or max_pixels is not None:
            size = image_processor.size
            raise ValueError(
                f"model.min_pixels and model.max_pixels do not apply to {self.title}, which resizes every image to "
                f"{size['height']} x {size['width']} pixels: leave them out."
            )

    def save_image_processor(self, image_processor: Any, folder: Path) -> None:
        super().save_image_processor(image_processor, folder)
        settings = {"image_seq_length": _length(image_processor), "processor_class": self.processor_class}
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (folder / "processor_config.json").write_text(text, encoding="utf-8")

    def preprocess(self, image_processor: Any, images: Sequence[Image.Image]) -> dict[str, NDArray[Any]]:
        features = image_processor(images=images, return_tensors="np", do_pan_and_scan=False)
        return {"pixel_values": np.ascontiguousarray(features["pixel_values"], dtype=np.float32)}

    def image_lengths(self, prompt: EncodedPrompt, readers: Readers) -> list[int]:
        count = len(prompt.image_inputs["pixel_values"]) if prompt.image_inputs else 0
        return [_length(readers.image_processor)] * count

    def encode_images(
        self, ids: NDArray[np.int64], text: str, images: Sequence[Image.Image], readers: Readers
    ) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        # In the text, not in its ids: the line breaks around an image join those before and after it in one token.
        soft = self.image_token * _length(readers.image_processor)
        expanded = text.replace(self.placeholder, f"\n\n{self.placeholder}{soft}{_END_OF_IMAGE}\n\n")
        tokens = readers.tokenizer(expanded, add_special_tokens=False)["input_ids"]
        return np.asarray(tokens, dtype=np.int64), self.preprocess(readers.image_processor, images)

    def expected_tokens(self, sample: Sample, readers: Readers) -> float:
        return len(sample.images) * (_length(readers.image_processor) + 4)

    def encoding_bytes(self, sample: Sample, readers: Readers) -> int:
        """12 bytes per pixel of the stored image (Pillow's four, a copy, the array) and 48 per pixel of the resized
        one: 3 channels of 4 bytes in the array, its normalised copy, the batch and the copy that joins images."""
        size = readers.image_processor.size
        stored = [source.header_pixels() or 0 for source in sample.images]
        return sum(12 * pixels + 48 * size["height"] * size["width"] for pixels in stored if pixels)

    def blocks(self, prompt: EncodedPrompt, readers: Readers) -> NDArray[np.int64] | None:
        """Each image is a block: a run of image tokens."""
        if not prompt.image_inputs:
            return None
        is_image = prompt.input_ids == readers.image_token_id
        is_start = is_image & ~np.concatenate([[False], is_image[:-1]])
        return np.where(is_image, is_start.cumsum() - 1, -1)

    def unusable(self, config: Any) -> str | None:
        text = config.text_config
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
            if getattr(text, name, None):
                return (
                    f"sets {name}, which is not supported (no published {self.title} does): choose another model.path."
                )
        return None

    def image_rule(
        self, settings: ImageSettings, config: Mapping[str, Any], min_pixels: int | None, max_pixels: int | None
    ) -> FixedImages:
        patch = (config.get("vision_config") or {}).get("patch_size", 14)
        return FixedImages(settings.size.height or 896, patch, config.get("mm_tokens_per_image", 256))

    def patches_per_token(self, config: Any) -> int:
        """Patches are averaged over squares."""
        side: int = config.vision_config.image_size // config.vision_config.patch_size
        return side**2 // config.mm_tokens_per_image  # type: ignore[no-any-return]

    def encode(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        features: Tensor = backbone(model).get_image_features(**inputs, return_dict=True).pooler_output
        return features.unbind(0)

    def blank_features(self, model: nn.Module, device: torch.device | str) -> Tensor:
        vision = backbone(model).config.vision_config
        pixels = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=device)
        return self.encode(model, {"pixel_values": pixels})[0]

    def layer_types(self, model: nn.Module) -> list[str]:
        return list(self.text(model).config.layer_types)

    def window(self, model: nn.Module) -> int | None:
        config = self.text(model).config
        return config.sliding_window if SLIDING in config.layer_types else None

    def rotary(
        self, model: nn.Module, count: int, device: torch.device | str, layer_type: str
    ) -> tuple[Tensor, Tensor]:
        text = self.text(model)
        positions = torch.arange(count, device=device)[None]
        cosines, sines = text.rotary_emb(text.embed_tokens.weight[:1], positions, layer_type)
        return cosines[0], sines[0]

    def layer(self, layer: Any, hidden: Tensor, attention: Callable[[Any, Tensor], Tensor]) -> Tensor:
        hidden = hidden + layer.post_attention_layernorm(attention(layer.self_attn, layer.input_layernorm(hidden)))
        output: Tensor = hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))
        return output

    def queries_and_keys(self, attention: Any, hidden: Tensor) -> Tensor:
        shape = (len(hidden), -1, attention.head_dim)
        queries = attention.q_norm(attention.q_proj(hidden).view(shape))
        return torch.cat((queries, attention.k_norm(attention.k_proj(hidden).view(shape))), dim=1)


def _length(image_processor: Any) -> int:
    """Tokens of an image."""
    length: int = image_processor.image_seq_length
    return length
