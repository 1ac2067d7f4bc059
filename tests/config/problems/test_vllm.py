"""Incompatible vLLM settings are each reported in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from medvqa_rl.config import Config, ConfigError
from medvqa_rl.config.yaml import build_config

VLLM = {"rollout": {"engine": "vllm"}}
SERVER = {"mode": "server", "server_url": "http://localhost:8000"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rollout": {"engine": "vlm"}},
            "rollout.engine is the text 'vlm', but must be eager, graph or vllm",
        ),
        (
            {"rollout": {"engine": "vllm", "temperature": 2.5}},
            "rollout.temperature is 2.5, but vLLM supports 0.01",
        ),
        ({"rollout": {"engine": "vllm", "temperature": 0.001}}, "rollout.temperature is 0.001, but vLLM supports"),
        (
            {"vllm": {"max_model_length": 256}},
            "vllm.max_model_length is 256 and rollout.max_completion_length",
        ),
        ({"vllm": {"mode": "server"}}, "vllm.mode is server, but vllm.server_url is not set: give its address"),
        ({"vllm": SERVER | {"server_url": "localhost:8000"}}, "vllm.server_url is 'localhost:8000', but must be the"),
        (
            {"vllm": SERVER | {"sleep": True}},
            "vllm.sleep is true, but vllm.mode is server",
        ),
        ({"vllm": {"server_url": "http://x"}}, "vllm.server_url is http://x, but vllm.mode is colocate"),
        (
            {"model": {"load_in_4bit": True, "lora": {}}},
            "rollout.engine is vllm and model.load_in_4bit is true, but vLLM",
        ),
        (
            {"model": {"device": "cpu"}, "vllm": {"sleep": True}},
            "vllm.sleep is true and model.device cpu, but only GPU builds",
        ),
        ({"vllm": {"max_logp_difference": 0}}, "vllm.max_logp_difference is 0, but"),
        (
            {"vllm": SERVER | {"server_url": "http://10.0.0.5:8000"}, "network": "off"},
            "vllm.server_url is on 10.0.0.5, but network is off, so nothing may leave this machine",
        ),
        (
            {"vllm": {"importance_sampling_clip_max": 0.5}},
            "vllm.importance_sampling_clip_max is 0.5, but",
        ),
        ({"vllm": {"vllm_importance_sampling_cap": 2}}, "it is called vllm.importance_sampling_clip_max here"),
        ({"rollout": {"engine": "vllm", "use_vllm": True}}, "it is called rollout.engine here"),
    ],
)
def test_each_incompatible_setting_is_reported(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(VLLM | changes, purpose="train")
    (problem,) = caught.value.problems
    assert problem.startswith(sentence) or sentence in problem
    assert problem.endswith((".", "?"))


def test_compatible_settings_are_accepted() -> None:
    for changes in (
        {},
        {"model": {"device": "cpu"}},
        {"vllm": SERVER},
        {"vllm": SERVER, "network": "off"},
        {"vllm": {"max_model_length": 1024}},
    ):
        assert build_config(VLLM | changes, purpose="train") == Config.model_validate(VLLM | changes)
    # Without rollouts on vLLM, a server without an address is not an error.
    for given, purpose in ((VLLM | {"vllm": {"mode": "server"}}, "sft"), ({"vllm": {"mode": "server"}}, "train")):
        assert build_config(given, purpose=purpose).vllm.server_url is None
