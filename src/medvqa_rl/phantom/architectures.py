"""Phantom VLMs of each family: the same sizes, words and images in another architecture.

An image has 112 x 112 pixels and 16 tokens in all of them (Qwen3-VL resizes it to 128 x 128).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import Gemma3Config, InternVLConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medvqa_rl.core.embedded import SIZES
from medvqa_rl.data.phantom.drawing import SIZE


class Size(NamedTuple):
    """Dimensions of a phantom VLM, and the number of its tower's parts. Every head of the language model has 32."""

    hidden: int
    layers: int
    width: int
    """Of the vision tower."""
    depth: int
    """Of the vision tower."""
    rate: float
    """Factor of the learning rates that train it, those of the size base being 1: about 1 / hidden, which is ours."""
    base_steps: int
    instruct_steps: int

    @property
    def heads(self) -> int:
        return self.hidden // 32


DIMENSIONS: Mapping[str, Size] = {
    "small": Size(hidden=64, layers=4, width=48, depth=3, rate=1.0, base_steps=1400, instruct_steps=1000),
    "base": Size(hidden=128, layers=4, width=96, depth=3, rate=1.0, base_steps=1400, instruct_steps=1000),
    "large": Size(hidden=256, layers=5, width=144, depth=4, rate=0.5, base_steps=1400, instruct_steps=1000),
}
"""0.4, 1.5 and 6 million weights as a Qwen2-VL."""
assert tuple(DIMENSIONS) == SIZES

_SIDE = 4
"""Image tokens along a side of an image."""

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_INTERN_TOKENS = (*QWEN_TOKENS[:3], "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
_INTERN_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n").replace(
    "<|vision_start|><|video_pad|><|vision_end|>", "<video>\n"
)
_GEMMA_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Phantom(NamedTuple):
    """What is particular to the phantom VLM of a family."""

    special_tokens: tuple[str, ...]
    """Padding first."""
    end: str
    """Ends a completion."""
    template: str
    image_processor: Callable[[], Any]
    config: Callable[[dict[str, int], Size], PretrainedConfig]
    """Takes the ids of the special tokens, and under "" the number of words; and the size."""
    named_tokens: dict[str, str] = {}
    """Special tokens that the stock processor asks the tokenizer for by name."""
    eos: str | None = None
    """The tokenizer's end-of-sequence token, if another."""


def _text(ids: dict[str, int], size: Size, **more: Any) -> dict[str, Any]:
    """The language model's settings."""
    return {
        "vocab_size": ids[""],
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        **more,
    }


def _qwen_text(ids: dict[str, int], size: Size, rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    return _text(
        ids,
        size,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope},
        bos_token_id=ids["<|im_start|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        **more,
    )


def _qwen(kind: Any, ids: dict[str, int], text: dict[str, Any], vision: dict[str, Any]) -> Any:
    return kind(
        text_config=text,
        vision_config={"spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4, **vision},
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
    )


def _tower(size: Size, ratio: int) -> dict[str, int]:
    """The vision tower's settings; ``ratio`` is that of its feed-forward layers."""
    dimensions = {"depth": size.depth, "hidden_size": size.width, "intermediate_size": ratio * size.width}
    return {**dimensions, "out_hidden_size": size.hidden}


def _qwen2_vl(ids: dict[str, int], size: Size) -> Any:
    vision = {
        "depth": size.depth,
        "embed_dim": size.width,
        "hidden_size": size.hidden,
        "mlp_ratio": 3,
        "patch_size": 14,
    }
    return _qwen(Qwen2VLConfig, ids, _qwen_text(ids, size, {"mrope_section": [4, 6, 6]}), vision)


def _qwen2_5_vl(ids: dict[str, int], size: Size) -> Any:
    vision = {**_tower(size, 2), "patch_size": 14}
    windows = {"window_size": 56, "fullatt_block_indexes": [size.depth - 1]}
    return _qwen(Qwen2_5_VLConfig, ids, _qwen_text(ids, size, {"mrope_section": [4, 6, 6]}), vision | windows)


def _qwen3_vl(ids: dict[str, int], size: Size) -> Any:
    vision = {**_tower(size, 3), "patch_size": 16}
    levels = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    rope = {"mrope_section": [4, 6, 6], "mrope_interleaved": True}
    text = _qwen_text(ids, size, rope, head_dim=32, attention_bias=True)
    return _qwen(Qwen3VLConfig, ids, text, vision | levels)


def _internvl(ids: dict[str, int], size: Size) -> Any:
    return InternVLConfig(
        text_config=_qwen_text(ids, size, {}, model_type="qwen2"),
        vision_config={
            **{"hidden_size": size.width, "intermediate_size": 3 * size.width, "num_hidden_layers": size.depth},
            "num_attention_heads": 4,
            **{"image_size": [SIZE, SIZE], "patch_size": [14, 14], "attention_bias": True},
            "layer_scale_init_value": 1.0,
        },
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=_SIDE**2,
        tie_word_embeddings=True,
    )


def _gemma3(ids: dict[str, int], size: Size) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    kinds = ["full_attention" if layer % 4 == 2 else "sliding_attention" for layer in range(size.layers)]
    return Gemma3Config(
        text_config=_text(
            ids,
            size,
            head_dim=32,
            query_pre_attn_scalar=32,
            attention_bias=True,
            layer_types=kinds,
            sliding_window=256,
            rope_parameters={"sliding_attention": rope, "full_attention": rope},
            bos_token_id=ids["<bos>"],
            eos_token_id=ids["<end_of_turn>"],
            pad_token_id=ids["<pad>"],
        ),
        vision_config={
            **{"hidden_size": size.width, "intermediate_size": 3 * size.width, "num_hidden_layers": size.depth},
            **{"num_attention_heads": 4, "image_size": SIZE, "patch_size": 14, "model_type": "siglip_vision_model"},
            "vision_use_head": False,
        },
        mm_tokens_per_image=_SIDE**2,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )


def _qwen_images(unit: int, **more: Any) -> Callable[[], Any]:
    area = (_SIDE * unit) ** 2
    return lambda: Qwen2VLImageProcessorPil(min_pixels=area, max_pixels=area, patch_size=unit // 2, **more)


def _gemma_images() -> Any:
    size = {"height": SIZE, "width": SIZE}
    return Gemma3ImageProcessorPil(size=size, image_seq_length=_SIDE**2, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _intern_images() -> Any:
    processor: Any = GotOcr2ImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, min_patches=1, max_patches=1, crop_to_patches=True
    )
    processor.image_seq_length = _SIDE**2
    return processor


_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PHANTOMS: dict[str, Phantom] = {
    "qwen2_vl": Phantom(QWEN_TOKENS, "<|im_end|>", QWEN_TEMPLATE, _qwen_images(28), _qwen2_vl),
    "qwen2_5_vl": Phantom(QWEN_TOKENS, "<|im_end|>", QWEN_TEMPLATE, _qwen_images(28), _qwen2_5_vl),
    "qwen3_vl": Phantom(QWEN_TOKENS, "<|im_end|>", QWEN_TEMPLATE, _qwen_images(32, **_HALF), _qwen3_vl),
    "gemma3": Phantom(
        _GEMMA_TOKENS,
        "<end_of_turn>",
        _GEMMA_TEMPLATE,
        _gemma_images,
        _gemma3,
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "<eos>",
    ),
    "internvl": Phantom(
        _INTERN_TOKENS,
        "<|im_end|>",
        _INTERN_TEMPLATE,
        _intern_images,
        _internvl,
        {
            **{"start_image_token": "<img>", "end_image_token": "</img>"},
            **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        },
    ),
}
"""By ``model_type``."""


@torch.no_grad()
def sharpen(model: Any, strength: float) -> None:
    """Make norms of queries and keys in the first layer keep scores as large as without norms.

    Args:
        strength: factor of the scores.
    """
    attention = model.model.language_model.layers[0].self_attn
    for norm in (
        getattr(attention, name) for name in ("q_norm", "k_norm") if name in dict(attention.named_children())
    ):
        has_unit_offset = not bool(norm.weight.any())  # Gemma's norms multiply by 1 + weight
        norm.weight.fill_(strength**0.5 - has_unit_offset)
