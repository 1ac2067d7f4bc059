"""Problems with the settings of vLLM, as complete sentences. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from medvqa_rl.config import Config
from medvqa_rl.core.network import is_loopback

TEMPERATURES = (0.01, 2.0)
"""vLLM raises lower temperatures to the first value and rejects those above the second."""


def vllm_problems(config: Config) -> Iterator[tuple[str, ...]]:
    """Yield each problem: a sentence, then the dotted paths of the settings involved."""
    vllm, rollout = config.vllm, config.rollout
    if rollout.engine != "vllm":
        return
    low, high = TEMPERATURES
    if not low <= rollout.temperature <= high:
        yield (
            f"rollout.temperature is {rollout.temperature:g}, but vLLM supports {low:g} to {high:g}: set it within "
            "that range, or set rollout.engine=eager.",
            "rollout.temperature",
            "rollout.engine",
        )
    if vllm.max_model_length is not None and vllm.max_model_length <= rollout.max_completion_length:
        yield (
            f"vllm.max_model_length is {vllm.max_model_length} and rollout.max_completion_length "
            f"{rollout.max_completion_length}, which leaves no room for the prompt and its image: raise the "
            "first or lower the second.",
            "vllm.max_model_length",
            "rollout.max_completion_length",
        )
    if config.model.load_in_4bit:
        yield (
            "rollout.engine is vllm and model.load_in_4bit is true, but vLLM would sample from full-precision weights "
            "while training uses 4-bit ones: set rollout.engine=eager, or model.load_in_4bit=false.",
            "rollout.engine",
            "model.load_in_4bit",
        )
    yield from _server_problems(config) if vllm.mode == "server" else _colocate_problems(config)


def _server_problems(config: Config) -> Iterator[tuple[str, ...]]:
    vllm = config.vllm
    if vllm.server_url is None:
        yield (
            "vllm.mode is server, but vllm.server_url is not set: give its address, such as http://localhost:8000.",
            "vllm.server_url",
            "vllm.mode",
        )
        return
    parts = urlsplit(vllm.server_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        yield (
            f"vllm.server_url is '{vllm.server_url}', but must be the address of a server, such as "
            "http://localhost:8000.",
            "vllm.server_url",
        )
    elif config.network == "off" and not is_loopback(parts.hostname):
        yield (
            f"vllm.server_url is on {parts.hostname}, but network is off, so nothing may leave this machine: use a "
            "server on this machine (http://localhost:8000), or set network=on.",
            "vllm.server_url",
            "network",
        )
    if vllm.sleep:
        yield (
            "vllm.sleep is true, but vllm.mode is server, and a server manages its own memory: set vllm.sleep=false.",
            "vllm.sleep",
            "vllm.mode",
        )


def _colocate_problems(config: Config) -> Iterator[tuple[str, ...]]:
    if config.vllm.server_url is not None:
        yield (
            f"vllm.server_url is {config.vllm.server_url}, but vllm.mode is colocate, which uses no server: set "
            "vllm.mode=server, or remove vllm.server_url.",
            "vllm.server_url",
            "vllm.mode",
        )
    if config.vllm.sleep and config.model.device == "cpu":
        yield (
            "vllm.sleep is true and model.device cpu, but only GPU builds of vLLM can release memory: set "
            "vllm.sleep=false.",
            "vllm.sleep",
            "model.device",
        )
