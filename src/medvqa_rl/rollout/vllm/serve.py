"""How a vLLM server must be started for a policy: the command, and the check of a running server."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from medvqa_rl.core.text import printable
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import as_shared
from medvqa_rl.models.loading import Policy, resolve_folder
from medvqa_rl.rollout.vllm.agreement import VllmError
from medvqa_rl.rollout.vllm.client import Client, HttpError
from medvqa_rl.rollout.vllm.cpu import EXTENSION
from medvqa_rl.rollout.vllm.engine import adapter_rank, max_lora_rank


class Served(NamedTuple):
    """What a server runs."""

    model: str
    """Its folder or Hub id."""
    instance: str
    """Changes when the server is restarted."""
    is_packed: bool
    """Its output layer must be packed again after new weights; see rollout/vllm/cpu.py."""


def serve_command(policy: Policy, *, is_cpu: bool = False) -> str:
    """The command that starts a matching server."""
    processor = policy.processor
    pixels = json.dumps(as_shared(processor.family).vllm_processor_arguments(processor.image_processor))
    words = ["VLLM_SERVER_DEV_MODE=1", "VLLM_NO_USAGE_STATS=1", "vllm", "serve", shlex.quote(model_folder(policy))]
    words += ["--enable-scale-out", "--dtype", dtype_of(policy), "--logprobs-mode", "processed_logprobs"]
    words += ["--generation-config", "vllm", "--mm-processor-kwargs", shlex.quote(pixels)]
    rank = adapter_rank(policy)
    if rank is not None:
        words.insert(0, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
        words += ["--enable-lora", "--max-lora-rank", str(max_lora_rank(rank))]
    if is_cpu:
        words += ["--no-enable-chunked-prefill"]
        if _needs_packing(policy):
            words += ["--worker-extension-cls", EXTENSION]
    return " ".join(words)


def check_server(client: Client, policy: Policy) -> Served:
    """Check that a server was started as training needs it.

    Raises:
        ValueError: it was not, or no vLLM server in development mode answers.
    """
    is_cpu = False
    try:
        config = _config(client)
        is_cpu = config["device_config"]["device"] == "cpu"
        served = Served(
            str(config["model_config"]["model"]), str(config["instance_id"]), is_cpu and _needs_packing(policy)
        )
        wrong = list(_differences(client, policy, config, is_cpu=is_cpu))
    except (VllmError, KeyError, TypeError) as error:
        raise ValueError(
            f"vllm.server_url is {client.url}, but no vLLM server in development mode answers there "
            f"({printable(str(error))}): start it with `{serve_command(policy, is_cpu=is_cpu)}`."
        ) from error
    if wrong:
        raise ValueError(
            f"The vLLM server at {client.url} was started with other settings than training needs "
            f"({'; '.join(wrong)}): start it with `{serve_command(policy, is_cpu=is_cpu)}`."
        )
    return served


def _config(client: Client) -> Any:
    return client.ask("GET", "/server_info?config_format=json")["vllm_config"]


def instance(client: Client) -> str:
    """A word that changes when the server is restarted.

    Raises:
        VllmError: it does not answer.
    """
    try:
        return str(_config(client)["instance_id"])
    except (KeyError, TypeError) as error:
        raise VllmError(f"The vLLM server at {client.url} no longer reports its settings ({error!r}).") from error


def _differences(client: Client, policy: Policy, config: Mapping[str, Any], *, is_cpu: bool) -> Iterator[str]:
    """Yield what is wrong with a server's settings."""
    model, lora, rank = config["model_config"], config["lora_config"], adapter_rank(policy)
    if model["model"] not in (policy.config.path, model_folder(policy)):
        yield f"it serves {model['model']}, but model.path is {policy.config.path}"
    for flag, name, needed in (
        ("--dtype", "dtype", dtype_of(policy)),
        ("--logprobs-mode", "logprobs_mode", "processed_logprobs"),
        ("--generation-config", "generation_config", "vllm"),
    ):
        given = str(model[name]).removeprefix("torch.")
        if given != needed:
            yield f"{flag} is {given} instead of {needed}"
    if _is_missing(client, "/inference/v1/generate"):
        yield "--enable-scale-out is missing"
    if rank is not None and lora is None:
        yield "--enable-lora is missing"
    elif rank is not None and lora["max_lora_rank"] < rank:
        yield f"--max-lora-rank is {lora['max_lora_rank']}, but an adapter of rank {rank} is trained"
    elif rank is not None and _is_missing(client, "/v1/load_lora_adapter"):
        yield "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 is missing"
    if is_cpu and config["scheduler_config"]["enable_chunked_prefill"]:
        yield "--no-enable-chunked-prefill is missing, without which its CPU build refuses seeds"
    if is_cpu and _needs_packing(policy) and config["parallel_config"]["worker_extension_cls"] != EXTENSION:
        yield "--worker-extension-cls is missing, without which its CPU build keeps the old output layer"


def _is_missing(client: Client, path: str) -> bool:
    """Whether the server lacks a route. Asked with an empty request, which a route that is there refuses."""
    try:
        client.ask("POST", path)
    except HttpError as error:
        return error.code in (403, 404)
    return False


def _needs_packing(policy: Policy) -> bool:
    """Whether the output layer shares its weights with the embeddings; see rollout/vllm/cpu.py."""
    return bool(causal_model(policy.model).config.tie_word_embeddings)


def dtype_of(policy: Policy) -> str:
    """The name of a policy's dtype in vLLM."""
    return str(causal_model(policy.model).lm_head.weight.dtype).removeprefix("torch.")


def model_folder(policy: Policy) -> str:
    """The folder of the model that training started from."""
    return str(resolve_folder(policy.config.path, policy.config.revision))
