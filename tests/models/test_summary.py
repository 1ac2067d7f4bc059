"""What is loaded and trained, in words, counted independently.

Run: pytest tests/models/test_summary.py
"""

from __future__ import annotations

from typing import Any

import pytest

from medvqa_rl.models.summary import count_parameters, describe, describe_training

CASES: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({}, ("language_model", "lm_head"), "all weights of the language model"),
    (
        {"train_projector": True, "train_vision": True},
        ("language_model", "lm_head", "visual"),
        "all weights of the language model, the projector, the vision tower",
    ),
    ({"lora": {"rank": 3}}, ("lora_",), "LoRA adapters of rank 3 in the language model"),
    (
        {"lora": {"rank": 2}, "train_projector": True},
        ("lora_", "modules_to_save"),
        "LoRA adapters of rank 2 in the language model, the projector",
    ),
]


@pytest.mark.parametrize(("changes", "trained", "parts"), CASES)
def test_what_is_loaded_and_trained(tiny_policy, changes, trained, parts):
    policy = tiny_policy(**changes)
    sizes = {name: weight.numel() for name, weight in policy.model.named_parameters()}
    total = sum(sizes.values())
    some = sum(size for name, size in sizes.items() if any(part in name for part in trained))
    assert count_parameters(policy.model) == (total, some)
    assert describe(policy) == f"Loaded {policy.config.path} (float32, cpu): {total:,} parameters."
    assert describe_training(policy) == f"Training {some:,} parameters ({100 * some / total:.1f}%): {parts}."
