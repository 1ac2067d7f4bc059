"""The parts of a model, and what its families pass to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor, nn


class Readers(NamedTuple):
    """What a checkpoint reads prompts with."""

    tokenizer: Any
    image_processor: Any
    """The family's Pillow image processor."""
    image_token_id: int


class Embedded(NamedTuple):
    """The input of the language model."""

    embeds: Tensor
    """(R, T, hidden) token embeddings, with image features at their placeholders."""
    arguments: Mapping[str, Any]
    """Further arguments of the language model, such as features for later layers."""


def causal_model(model: nn.Module) -> Any:
    """The ``...ForConditionalGeneration`` of a plain or PEFT model; it has ``model`` and ``lm_head``."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: nn.Module) -> Any:
    """The model without its output layer; it has ``language_model``."""
    return causal_model(model).model


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer adds its special tokens to a rendered prompt: not if the chat template wrote the first of
    them, as in the ``apply_chat_template`` of the stock processors."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
