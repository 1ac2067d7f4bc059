"""Families of models: the only place that knows an architecture."""

from __future__ import annotations

from torch import nn

from medvqa_rl.models.families.family import Family, causal_model
from medvqa_rl.models.families.internvl import InternVL
from medvqa_rl.models.families.qwen2_vl import Qwen2VL, Qwen25VL
from medvqa_rl.models.families.qwen3_vl import Qwen3VL

FAMILIES: tuple[Family, ...] = (Qwen2VL(), Qwen25VL(), Qwen3VL(), InternVL())


def family_for(model_type: str) -> Family | None:
    """The family of a ``model_type``, None if there is none."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model, plain or with an adapter."""
    family = family_for(causal_model(model).config.model_type)
    assert family is not None, "models are loaded for a family"
    return family


def supported() -> str:
    """The families in words, with their model types."""
    return ", ".join(f"{family.title} ({', '.join(family.model_types)})" for family in FAMILIES)
