"""What can be wrong with the settings of vLLM, said in complete sentences. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from medvqa_rl.config import Config
from medvqa_rl.core.network import is_loopback

TEMPERATURES = (0.01, 2.0)
"""vLLM raises lower temperatures to the first and refuses those above the second."""


def vllm_problems(config: Config) -> Iterator[tuple[str, ...]]:
    """Everything that does not fit together: a sentence, then the dotted paths of the settings it is about."""
    vllm, rollout = config.vllm, config.rollout
    if rollout.engine != "vllm":
        return
    low, high = TEMPERATURES
    if not low <= rollout.temperature <= high:
        yield (
            f"rollout.temperature is {rollout.temperature:g}, but vLLM samples at {low:g} to {high:g}: choose one in "
            "between, or set rollout.engine=eager.",
            "rollout.temperature",
            "rollout.engine",
        )
    if vllm.max_model_length is not None and vllm.max_model_length <= rollout.max_completion_length:
        yield (
            f"vllm.max_model_length is {vllm.max_model_length} and rollout.max_completion_length "
            f"{rollout.max_completion_length}, but a prompt with its image must have room beside its completion: "
            "raise the one or lower the other.",
            "vllm.max_model_length",
            "rollout.max_completion_length",
        )
    if config.model.load_in_4bit:
        yield (
            "rollout.engine is vllm and model.load_in_4bit true, but vLLM would sample from the weights in full "
            "precision and training learn with those in 4 bits: set rollout.engine=eager, or "
            "model.load_in_4bit=false.",
            "rollout.engine",
            "model.load_in_4bit",
        )
    yield from _server_problems(config) if vllm.mode == "server" else _colocate_problems(config)


def _server_problems(config: Config) -> Iterator[tuple[str, ...]]:
    vllm = config.vllm
    if vllm.server_url is None:
        yield (
            "vllm.mode is server, but vllm.server_url names none: give its address, such as http://localhost:8000.",
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
            f"vllm.server_url is on {parts.hostname}, but network is off, so nothing may leave this machine: serve "
            "here (http://localhost:8000), or set network=on.",
            "vllm.server_url",
            "network",
        )
    if vllm.sleep:
        yield (
            "vllm.sleep is true, but vllm.mode is server, whose memory is its own: set vllm.sleep=false.",
            "vllm.sleep",
            "vllm.mode",
        )


def _colocate_problems(config: Config) -> Iterator[tuple[str, ...]]:
    if config.vllm.server_url is not None:
        yield (
            f"vllm.server_url is {config.vllm.server_url}, but vllm.mode is colocate, which asks no server: set "
            "vllm.mode=server, or remove the address.",
            "vllm.server_url",
            "vllm.mode",
        )
    if config.model.device == "cpu":
        yield (
            "rollout.engine is vllm and model.device cpu, but vLLM runs beside training on a GPU: set "
            "rollout.engine=eager, or vllm.mode=server with a server elsewhere.",
            "rollout.engine",
            "model.device",
        )
