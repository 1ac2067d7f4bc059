"""The phantom VLM: a tiny vision-language model with its tokenizer, built from scratch.

It has the architecture, special tokens, chat template and files of a real family, so the code for real checkpoints
runs unchanged. Trained weights of a Qwen2-VL ship in ``phantom/assets``; :mod:`medvqa_rl.phantom.build` trains them,
and those of other families.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from medvqa_rl.core.prompts import CHOICE_HINT, INSTRUCTIONS, TAGS
from medvqa_rl.core.types import LETTERS
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.models.families import family_for, family_of
from medvqa_rl.models.processor import Processor
from medvqa_rl.phantom.architectures import DIMENSIONS, PHANTOMS, sharpen
from medvqa_rl.phantom.training import byte_level_bpe


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


def build_tokenizer(family: str = "qwen2_vl", vocab_size: int = 620) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the phantom corpus: encodes any text, with one token per word of the phantom world.

    The four answer tags are non-special added tokens: one token each, and visible when decoded.
    """
    phantom = PHANTOMS[family]
    tokenizer = byte_level_bpe(corpus(), vocab_size, phantom.special_tokens)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=phantom.eos or phantom.end,
        pad_token=phantom.special_tokens[0],
        **({"bos_token": "<bos>"} if "<bos>" in phantom.special_tokens else {}),
        **({"extra_special_tokens": phantom.named_tokens} if phantom.named_tokens else {}),
        chat_template=phantom.template,
        model_max_length=4096,
    )


def build_processor(family: str = "qwen2_vl") -> Processor:
    """Build the processor of a phantom VLM; an image has 16 tokens."""
    own = family_for(family)
    assert own is not None
    return Processor(own, build_tokenizer(family), PHANTOMS[family].image_processor())


def build_model(processor: Processor, seed: int = 0, size: str = "base") -> Any:
    """Build the phantom VLM of the processor's family with random float32 weights, in one of :data:`DIMENSIONS`."""
    (family,) = processor.family.model_types
    phantom, tokenizer = PHANTOMS[family], processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in phantom.special_tokens}
    config = phantom.config(ids | {"": -(-len(tokenizer) // 16) * 16}, DIMENSIONS[size])
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    _initialise_for_copying(model, generator)
    _initialise_vision(model, generator)
    sharpen(model, 7.5)
    model.generation_config.eos_token_id = ids[phantom.end]
    model.generation_config.pad_token_id = ids[phantom.special_tokens[0]]
    return model


@torch.no_grad()
def _initialise_for_copying(model: Any, generator: torch.Generator) -> None:
    """Initialise the language model so that it can look up tokens in its context.

    To bind an option to its letter, one layer must record the tokens before each word, and a later layer must find
    the word again. With the usual initialisation both must be learned before either helps, and training stays at
    chance for thousands of steps. Therefore:

    - Two heads of layer 0 start by attending 1 and 2 tokens back. Rotary embeddings turn constant query and key
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
    frequency = 10000.0 ** (-torch.arange(fast) / half)  # of all phantoms
    first = text.layers[0].self_attn
    for head in range(2):
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
def _initialise_vision(model: Any, generator: torch.Generator) -> None:
    """Initialise the vision tower with variance 1 / fan_in; the usual 0.02 suits towers ten times as wide."""
    for _, parameter, _ in family_of(model).vision_parameters(model):
        if parameter.ndim >= 2:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
