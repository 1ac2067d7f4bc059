"""The phantom VLM: a tiny ``Qwen2VLForConditionalGeneration`` with its tokenizer, built from scratch.

It has the architecture, special tokens, chat template and files of Qwen2-VL, so the code for real checkpoints runs
unchanged. Trained weights ship in ``phantom/assets``; :mod:`medvqa_rl.phantom.build` trains them.
"""

from __future__ import annotations

import torch
from tokenizers import AddedToken
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from medvqa_rl.core.prompts import CHOICE_HINT, INSTRUCTIONS, TAGS
from medvqa_rl.core.types import LETTERS
from medvqa_rl.data.phantom.drawing import SIZE
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.models.families.qwen2_vl import Qwen2VL
from medvqa_rl.models.processor import Processor
from medvqa_rl.phantom.training import byte_level_bpe

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
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


def corpus(count: int = 4000) -> list[str]:
    """Texts that the tokenizer is trained on."""
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", CHOICE_HINT]
    texts += [INSTRUCTIONS["think_answer"], INSTRUCTIONS["direct"]]
    texts += [f"cyst {letter}." for letter in LETTERS[:8]] * 200  # so that each letter becomes a token
    for index in range(count):
        sample = draw_sample(seed=0, split="tokenizer", index=index)
        options = "".join(f"\n{letter}: {text}" for letter, text in zip("ABCD", sample.options))
        texts += [f"{sample.question}{options}", sample.reasoning, sample.answer]
    return texts


def build_tokenizer(vocab_size: int = 620) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the phantom corpus: encodes any text, with one token per word of the phantom world.

    The four answer tags are non-special added tokens: one token each, and visible when decoded.
    """
    tokenizer = byte_level_bpe(corpus(), vocab_size, SPECIAL_TOKENS)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def build_processor() -> Processor:
    """Build the processor of the phantom VLM; images are resized to 112 x 112 pixels, which are 16 image tokens."""
    image_processor = Qwen2VLImageProcessorPil(min_pixels=SIZE * SIZE, max_pixels=SIZE * SIZE)
    return Processor(Qwen2VL(), build_tokenizer(), image_processor)


def build_model(processor: Processor, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Build a phantom VLM with random float32 weights, about 1.5 million parameters."""
    tokenizer = processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 16) * 16,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 96,
            "hidden_size": 128,
            "num_heads": 4,
            "mlp_ratio": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    _initialise_for_copying(model, generator)
    _initialise_vision(model, generator)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


@torch.no_grad()
def _initialise_for_copying(model: Qwen2VLForConditionalGeneration, generator: torch.Generator) -> None:
    """Initialise the language model so that it can look up tokens in its context.

    To bind an option to its letter, one layer must record the tokens before each word, and a later layer must find
    the word again. With the usual initialisation both must be learned before either helps, and training stays at
    chance for thousands of steps. Therefore:

    - Half the heads of layer 0 start by attending 1 and 2 tokens back. Rotary embeddings turn constant query and key
      biases into a function of distance: the sum over the fast frequencies f of cos(f * (distance - offset)), which
      peaks at the offset.
    - Half the heads of layers 1 and 2 start with equal query and key projections on the slow frequencies, which hardly
      depend on distance, so that a token attends to equal tokens.

    All weights are trained from there.
    """
    text = model.model.language_model
    for parameter in text.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.06, generator=generator)
    text.embed_tokens.weight.normal_(0, 0.1, generator=generator)
    heads = text.config.num_attention_heads
    width = text.config.hidden_size // heads
    half, fast, strength = width // 2, 5, 7.0
    frequency = text.config.rope_parameters["rope_theta"] ** (-torch.arange(fast) / half)
    first = text.layers[0].self_attn
    for head in range(heads // 2):
        rows, offset = slice(head * width, (head + 1) * width), head + 1
        query, key = torch.zeros(width), torch.zeros(width)
        key[:fast] = strength
        query[:fast] = strength * torch.cos(frequency * offset)
        query[half : half + fast] = -strength * torch.sin(frequency * offset)
        first.q_proj.bias[rows], first.k_proj.bias[rows] = query, key
        first.q_proj.weight[rows] *= 0.1
        first.k_proj.weight[rows] *= 0.1
    for layer in text.layers[1:3]:
        for head in range(heads // 2):
            rows = slice(head * width, (head + 1) * width)
            projection = torch.randn(width, text.config.hidden_size, generator=generator) * 0.15
            projection[: half // 2] *= 0.1
            projection[half : half + half // 2] *= 0.1
            layer.self_attn.q_proj.weight[rows] = projection
            layer.self_attn.k_proj.weight[rows] = projection


@torch.no_grad()
def _initialise_vision(model: Qwen2VLForConditionalGeneration, generator: torch.Generator) -> None:
    """Initialise the vision tower with variance 1 / fan_in; the usual 0.02 suits towers ten times as wide."""
    for parameter in model.model.visual.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
