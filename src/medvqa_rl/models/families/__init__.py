"""Families of models: the only place that knows an architecture."""

from __future__ import annotations

from functools import cache

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from medvqa_rl.models.families.family import Family
from medvqa_rl.models.families.gemma3 import Gemma3
from medvqa_rl.models.families.generic import Generic
from medvqa_rl.models.families.internvl import InternVL
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.qwen2_vl import Qwen2VL, Qwen25VL
from medvqa_rl.models.families.qwen3_vl import Qwen3VL
from medvqa_rl.models.families.shared import SharedFamily, as_shared

FAMILIES: tuple[SharedFamily, ...] = (Qwen2VL(), Qwen25VL(), Qwen3VL(), Gemma3(), InternVL())


def family_for(model_type: str) -> Family | None:
    """The family of a ``model_type``: its own, or a generic one if transformers has such a model that reads images and
    text and writes text; else None."""
    own = next((family for family in FAMILIES if model_type in family.model_types), None)
    if own is None and model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return _generic(model_type)
    return own


_generic = cache(Generic)


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model, plain or with an adapter."""
    family = family_for(causal_model(model).config.model_type)
    assert family is not None, "models are loaded for a family"
    return family


def shared_family_of(model: nn.Module) -> SharedFamily:
    """The same, in code that runs for shared prompts only."""
    return as_shared(family_of(model))


def supported() -> str:
    """The families in words, with their model types."""
    return ", ".join(f"{family.title} ({', '.join(family.model_types)})" for family in FAMILIES)
