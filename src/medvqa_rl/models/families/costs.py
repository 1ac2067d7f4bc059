"""Dimensions of a model and the cost of its images, from the files of a checkpoint that is not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import local_file
from medvqa_rl.core.files import read_json
from medvqa_rl.core.text import printable
from medvqa_rl.models.dimensions import Architecture, ImageRule, ImageSettings, Parameters
from medvqa_rl.models.families import FAMILIES, family_for, supported
from medvqa_rl.models.families.family import Family
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.published import SIZES, size_of
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.models.untrusted import FILE_ERRORS

_SETTINGS: TypeAdapter[Mapping[str, Any]] = TypeAdapter(Mapping[str, Any])
_IMAGES = TypeAdapter(ImageSettings)


def read_architecture(settings: Mapping[str, Any]) -> Architecture:
    """Measure the model that a config.json describes, in the Hub's layout or as transformers 5 saves it.

    The model is built without memory for its weights.

    Raises:
        ValueError: the family is not supported, or the settings describe no model.
    """
    kind = str(settings.get("model_type"))
    family = next((family for family in FAMILIES if kind in family.model_types), None)
    if family is None:
        raise ValueError(
            f"The config.json is of a {printable(kind, 80)} model, but estimates are for {supported()} only: choose "
            "one of these."
        )
    try:
        others = {name: value for name, value in settings.items() if name != "model_type"}
        config = AutoConfig.for_model(kind, **others)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
        model.tie_weights()
        return measure(family, model)
    except FILE_ERRORS as error:
        why = printable(" ".join(str(error).split()), 400)
        raise ValueError(
            f"The config.json describes no {family.title} model ({why}): take the file from the checkpoint."
        ) from error


def measure(family: SharedFamily, model: nn.Module) -> Architecture:
    """The dimensions of a model."""
    text, head = family.text(model), causal_model(model).lm_head
    embedding = text.embed_tokens
    vision = [(name, parameter) for name, parameter, _ in family.vision_parameters(model)]
    projector = {name: parameter for name, parameter, is_projector in family.vision_parameters(model) if is_projector}
    layer, seen = text.layers[0], family.vision_layers(model)
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    (patches,) = [
        module
        for part in family.vision_modules(model)
        for module in part.modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d)
    ]
    of_vision = [[module for module in one.modules() if isinstance(module, nn.Linear)] for one in seen]
    narrow = of_vision[0][-1]  # the MLP's last product
    wide = [module for module in of_vision[0] if {module.in_features, module.out_features} == _sides(narrow)]
    architecture = Architecture(
        parameters=Parameters(
            layers=_count(text) - _count(embedding),
            embedding=_count(embedding),
            head=0 if head.weight is embedding.weight else _count(head),
            tower=sum(parameter.numel() for name, parameter in vision if name not in projector),
            projector=sum(parameter.numel() for parameter in projector.values()),
        ),
        vocabulary=embedding.weight.shape[0],
        hidden=embedding.weight.shape[1],
        intermediate=text.config.intermediate_size,
        layers=len(text.layers),
        heads=text.config.num_attention_heads,
        kv_heads=text.config.num_key_value_heads,
        head_size=layer.self_attn.head_dim,
        linears={name.rpartition(".")[2]: (one.in_features, one.out_features) for name, one in linears.items()},
        patch_values=patches.weight[0].numel(),
        patches_per_token=family.patches_per_token(causal_model(model).config),
        vision_layers=len(seen),
        vision_hidden=narrow.out_features,
        vision_intermediate=narrow.in_features,
        vision_is_gated=len(wide) == 3,
        tower_weights=sum(module.weight.numel() for one in of_vision for module in one),
        projector_weights=sum(parameter.numel() for parameter in projector.values() if parameter.dim() > 1),
        largest_projector_weight=max(parameter.numel() for parameter in projector.values()),
    )
    return replace(architecture, **family.attention_windows(causal_model(model).config))


def _sides(linear: nn.Linear) -> set[int]:
    return {linear.in_features, linear.out_features}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def image_rule(model: ModelConfig, size: str | None = None) -> tuple[ImageRule, str]:
    """What images cost the configured model, and the source of the limits in words.

    They are read from the checkpoint's files if they are on this machine (a folder, an embedded model or the Hub
    cache), and default to those published with its family, or with the first one if it is not known.
    ``model.min_pixels`` and ``model.max_pixels`` override them. Opens no connection.

    Args:
        size: a key of ``SIZES``, instead of the checkpoint.

    Raises:
        ValueError: a file is damaged.
    """
    content, file = _published_or_local(model, size)
    kind = str(content.get("model_type"))
    family = next((one for one in FAMILIES if kind in one.model_types), FAMILIES[0])
    other = family_for(kind)
    if other is not None and other is not family:
        return family.image_rule(ImageSettings(), {}, None, None), f"of {family.title}, roughly for {other.title}"
    settings, where = ImageSettings(), f"as published with {family.title}"
    if file is not None:
        settings, where = read_json(_IMAGES, file, "copy the file from the checkpoint"), f"from {model.path}"
    return family.image_rule(settings, content, model.min_pixels, model.max_pixels), where


def family_at(model: ModelConfig) -> Family | None:
    """The family of the configured model; None if neither its config.json is on this machine nor its name is known.

    Raises:
        ValueError: the config.json is damaged.
    """
    return family_for(str(_published_or_local(model, None)[0].get("model_type")))


def _published_or_local(model: ModelConfig, size: str | None) -> tuple[Mapping[str, Any], Path | None]:
    """The content of a model's config.json, empty if it is not known, and its preprocessor_config.json, if any."""
    config = local_file(model.path, model.revision, "config.json")
    if size is None and config is None:
        size = size_of(model.path)
    if size is not None:
        return SIZES[size], None
    content = {} if config is None else read_json(_SETTINGS, config, "copy the file from the checkpoint")
    return content, local_file(model.path, model.revision, "preprocessor_config.json")
