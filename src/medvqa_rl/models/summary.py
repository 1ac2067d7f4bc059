"""What is loaded and how much of it is trained, in words."""

from __future__ import annotations

from typing import cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.loading import Policy


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of parameters and of trained parameters. A uint8 parameter packs two 4-bit weights per element."""
    total = trained = 0
    for parameter in model.parameters():
        size = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        total += size
        trained += size if parameter.requires_grad else 0
    return total, trained


def describe(policy: Policy) -> str:
    """A sentence with a policy's checkpoint, dtype, device and number of parameters."""
    config = policy.config
    adapter = "" if config.adapter is None else f" with the adapter {config.adapter}"
    dtype = str(causal_model(policy.model).lm_head.weight.dtype).removeprefix("torch.")
    bits = ", base weights in 4 bits" if config.load_in_4bit else ""
    total, _ = count_parameters(policy.model)
    return f"Loaded {config.path}{adapter} ({dtype}{bits}, {policy.device}): {total:,} parameters."


def describe_training(policy: Policy) -> str:
    """A sentence with the parts of a policy that are trained, and their share of the parameters."""
    total, trained = count_parameters(policy.model)
    family = policy.family
    language = any(parameter.requires_grad for parameter in family.text(policy.model).parameters())
    # Of each trained weight of the vision side, whether it belongs to the projector.
    visual = {
        is_projector
        for _, parameter, is_projector in family.vision_parameters(policy.model)
        if parameter.requires_grad
    }
    parts = []
    if language and isinstance(policy.model, PeftModel):
        parts.append(
            f"LoRA adapters of rank {cast(LoraConfig, policy.model.peft_config['default']).r} in the language model"
        )
    elif language:
        parts.append("all weights of the language model")
    if True in visual:
        parts.append("the projector")
    if False in visual:
        parts.append("the vision tower")
    return f"Training {trained:,} parameters ({trained / total:.1%}): {', '.join(parts)}."
