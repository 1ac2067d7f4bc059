"""Settings of averaged weights that contradict others."""

from __future__ import annotations

import pytest

from medvqa_rl.config import ConfigError
from medvqa_rl.config.yaml import build_config


@pytest.mark.parametrize(
    ("model", "purpose", "message"),
    [
        ({"average_weight": 0.7}, "eval", "model.average_weight is 0.7, but model.average_with is not set"),
        ({"average_with": "phantom:base"}, "train", "model.average_with is phantom:base, but weights are averaged"),
        ({"average_with": "phantom:base"}, "sft", "write it with medvqa-rl export --average"),
        ({"average_with": "phantom:base", "load_in_4bit": True}, "eval", "4-bit weights cannot be averaged"),
        ({"average_with": "phantom:base", "average_weight": 1.2}, "eval", "model.average_weight is 1.2"),
    ],
)
def test_contradictions_are_refused(model: dict[str, object], purpose: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"model": model}, purpose=purpose)
    assert message in str(caught.value)


def test_an_evaluation_may_average() -> None:
    config = build_config({"model": {"average_with": "phantom:base", "average_weight": 0.7}}, purpose="eval")
    assert (config.model.average_with, config.model.average_weight) == ("phantom:base", 0.7)
