"""Tiny random models of every family, with the tokenizer, chat template and image processor of its checkpoints.

To prove a new family, add a builder to ``BUILDERS``, what its stock forward takes to stock.py, and run this folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    GemmaTokenizer,
    InternVLConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medvqa_rl.config import ModelConfig
from medvqa_rl.models.families import family_of
from medvqa_rl.models.loading import Policy, make_policy
from medvqa_rl.models.processor import Processor

CORPUS = (
    "You are a helpful assistant. system user assistant Is there a pleural effusion in the left lung? "
    "Answer with the letter. Think in, then answer in. Answer with the answer only. yes no A: B: C: D: "
    "The chest X-ray shows an opacity in the right lower lobe. Which organ is seen in this image? brain liver kidney"
)
WORDS = 320
"""Tokens of the vocabulary before the special ones."""
TAG_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
QWEN_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end"),
        *("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)
QWEN2_VL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_VL_TEMPLATE = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].content is string %}{{- messages[0].content }}{%- else %}"
    "{%- for part in messages[0].content %}{%- if 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}"
    "{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for part in message.content %}"
    "{%- if part.type == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Without a default system prompt."""
QWEN3_VL_THINKING_TEMPLATE = QWEN3_VL_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
INTERNVL_TOKENS = (
    ("start_image_token", "<img>"),
    ("end_image_token", "</img>"),
    ("context_image_token", "<IMG_CONTEXT>"),
    ("video_token", "<video>"),
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
"""The system prompt opens the first user turn."""


class Parts(NamedTuple):
    """What a family's checkpoint consists of, without the weights."""

    config: Any
    tokenizer: Any
    image_processor: Any
    processor: str
    """The class of transformers that the published checkpoints name."""


@cache
def qwen_tokenizer(template: str = QWEN2_VL_TEMPLATE, named: tuple[tuple[str, str], ...] = ()) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of about 340 tokens with the special tokens of Qwen's vision-language models, and
    further ones that the processor finds by name."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator([CORPUS], trainer)

    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens=[*QWEN_TOKENS, *dict(named).values()],
        **dict(named),
        chat_template=template,
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAG_TOKENS])
    return tokenizer


def qwen_text(tokenizer: Any) -> dict[str, Any]:
    """Hidden 32, 2 layers, 4 heads that share 2 keys; 10 padding rows in the vocabulary."""
    return {
        "vocab_size": len(tokenizer) + 10,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,  # wide, so that tokens, positions and images all show in the logits
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }


def qwen_ids(tokenizer: Any) -> dict[str, Any]:
    """Settings of the whole model that name tokens."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in zip(keys, names)}
    return ids | {"tie_word_embeddings": True}


def qwen2_vl() -> Parts:
    tokenizer = qwen_tokenizer()
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "initializer_range": 0.3, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=qwen_text(tokenizer),
        vision_config=vision | {"embed_dim": 32, "hidden_size": 32},
        **qwen_ids(tokenizer),
    )
    return Parts(config, tokenizer, Qwen2VLImageProcessorPil(max_pixels=112 * 112), "Qwen2VLProcessor")


def qwen2_5_vl() -> Parts:
    """The first layer of the tower attends within windows of 56 x 56 pixels."""
    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 14,
        "initializer_range": 0.3,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config=qwen_text(tokenizer), vision_config=vision, **qwen_ids(tokenizer))
    return Parts(config, tokenizer, Qwen2VLImageProcessorPil(max_pixels=112 * 112), "Qwen2_5_VLProcessor")


@cache
def gemma_tokenizer() -> GemmaTokenizer:
    """A BPE tokenizer with byte fallback, tokens for runs of line breaks, and Gemma's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=WORDS - 256, show_progress=False)
    bpe.train_from_iterator([CORPUS], trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + sorted(trained["vocab"], key=trained["vocab"].get)
    tokenizer = GemmaTokenizer(
        vocab={token: index for index, token in enumerate([*tokens, "<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])},
        merges=[tuple(merge) for merge in trained["merges"]],
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        chat_template=GEMMA3_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken("\n" * count, normalized=False, special=False) for count in range(1, 5)])
    tokenizer.add_tokens([AddedToken(f"<{edge}_of_turn>", special=True) for edge in ("start", "end")])
    return tokenizer


def gemma3(window: int = 24) -> Parts:
    """Three layers of both types, a window shorter than the prompts, heads 12 wide, and images of 4 tokens.

    Layers normalise what they add, so that larger embeddings, which are scaled by sqrt(32), would repeat each token.
    """
    tokenizer = gemma_tokenizer()
    text = {
        "vocab_size": len(tokenizer) + 10,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": window,
        "initializer_range": 0.1,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
        },
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")},
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    ids = {
        f"{key}_token_index": tokenizer.convert_tokens_to_ids(token)
        for key, token in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>"))
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    image_processor = Gemma3ImageProcessorPil(
        size={"height": 56, "width": 56}, image_seq_length=4, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Parts(config, tokenizer, image_processor, "Gemma3Processor")


def qwen3_vl(template: str = QWEN3_VL_TEMPLATE) -> Parts:
    """Two layers of three in the tower and the language model exchange DeepStack features; heads are 12 wide."""
    tokenizer = qwen_tokenizer(template)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    text = {"num_hidden_layers": 3, "head_dim": 12, "rope_parameters": rope}
    vision = {
        "depth": 3,
        "num_heads": 2,
        "patch_size": 16,
        "initializer_range": 0.3,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(text_config=qwen_text(tokenizer) | text, vision_config=vision, **qwen_ids(tokenizer))
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=32 * 32, max_pixels=128 * 128, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Parts(config, tokenizer, image_processor, "Qwen3VLProcessor")


def internvl(text: type = Qwen2Config, **more: Any) -> Parts:
    """Tiles of 28 x 28 pixels and 4 tokens; an image has 1 to 7, the thumbnail included."""
    tokenizer = qwen_tokenizer(INTERNVL_TEMPLATE, INTERNVL_TOKENS)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    vision = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "image_size": [28, 28],
        "patch_size": [7, 7],
        "initializer_range": 0.3,
        "layer_scale_init_value": 0.7,
    }
    # With one axis the logits are sharper than with M-RoPE, and gradients of 1,000 are computed less exactly.
    settings = qwen_text(tokenizer) | {"rope_parameters": rope, "initializer_range": 0.25} | more
    config = InternVLConfig(
        text_config=text(**settings).to_dict(),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    image_processor = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6, crop_to_patches=True)
    image_processor.image_seq_length = 4
    return Parts(config, tokenizer, image_processor, "InternVLProcessor")


def internvl_qwen3() -> Parts:
    """InternVL3.5; heads are 12 wide."""
    return internvl(Qwen3Config, head_dim=12)


BUILDERS: dict[str, Callable[[], Parts]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "gemma3": gemma3,
    "internvl": internvl,
    "internvl_qwen3": internvl_qwen3,
}


def random_model(name: str, seed: int = 0, attention: str = "sdpa") -> Any:
    """A random model in float32 whose generation settings are plain greedy decoding."""
    parts = BUILDERS[name]()
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(parts.config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = parts.tokenizer.eos_token_id
    model.generation_config.pad_token_id = parts.tokenizer.pad_token_id
    return model


def tiny_policy(name: str, *, seed: int = 0, **settings: Any) -> Policy:
    """A tiny policy of a family, with ``settings`` of the section ``model``.

    Norms and biases are changed from their initial ones and zeros, and so are the zeros of a LoRA, because a formula
    that leaves one of them out would go unnoticed. One token in eight ends a completion.
    """
    _, tokenizer, image_processor, _ = BUILDERS[name]()
    config = ModelConfig(path=name, device="cpu", **settings)
    model = random_model(name, seed, config.attention)
    shake(model, "", seed)
    shake(model, "mm_input_projection_weight", seed)  # zeros at first
    processor = Processor(family_of(model), tokenizer, image_processor, stop_ids=range(0, WORDS, 8))
    policy = make_policy(model, processor, config, "cpu")
    shake(policy.model, "lora_B", seed)
    return policy


@torch.no_grad()
def shake(model: torch.nn.Module, name: str, seed: int) -> None:
    """Add noise to the vectors of a model, or to the parameters with a name."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if name in key if name else parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
