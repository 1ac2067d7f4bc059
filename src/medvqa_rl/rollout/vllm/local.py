"""vLLM in the training process (``vllm.mode: colocate``). Not yet run on a GPU; see rollout/vllm/engine.py.

Each rank has its own engine, independent of the others. Images are passed as features of the policy's own vision
tower, so they are encoded once and vLLM's tower is never used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medvqa_rl.config import VllmConfig
from medvqa_rl.core.text import printable
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import as_shared
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.vllm.agreement import VllmError
from medvqa_rl.rollout.vllm.cpu import EXTENSION
from medvqa_rl.rollout.vllm.engine import (
    Answer,
    Request,
    Sampled,
    adapter_rank,
    collapsed,
    known,
    max_lora_rank,
    write_adapter,
)
from medvqa_rl.rollout.vllm.serve import dtype_of, model_folder

ADAPTER = "policy"
"""The adapter's name in vLLM."""
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
"""Set these before creating a :class:`Colocated`: vLLM runs in this process, so that weights can be passed as tensors,
and sends no usage statistics."""


class Colocated:
    """A ``vllm.LLM`` in this process."""

    takes_features = True

    def __init__(self, policy: Policy, config: VllmConfig, *, rank: int, num_ranks: int) -> None:
        """
        Args:
            policy: vLLM loads its folder; :meth:`load` then replaces the weights.
            config: the vLLM settings.
            rank: of this process.
            num_ranks: number of processes, which all start an engine together.

        Raises:
            ValueError: vLLM is not installed, or does not start with these settings.
        """
        try:
            from vllm import LLM, SamplingParams, TokensPrompt
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ValueError(not_installed(error)) from error
        self._sampling_params, self._tokens_prompt, self._lora_request = SamplingParams, TokensPrompt, LoRARequest
        self._processor = policy.processor
        self._lora_rank = adapter_rank(policy)
        self._sleeps = config.sleep
        self._is_asleep = False
        self._folder = TemporaryDirectory(prefix="medvqa-rl-", dir=config.weights_dir)
        arguments = engine_arguments(policy, config, rank=rank, num_ranks=num_ranks)
        try:
            self._llm = LLM(**arguments)
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"vLLM does not start with these settings ({printable(str(error), 400)}): it needs a GPU, or its CPU "
                "build and model.device=cpu, with room for vllm.gpu_memory_utilization="
                f"{config.gpu_memory_utilization:g} of the memory; change that or vllm.max_model_length, or set "
                "rollout.engine=eager."
            ) from error

    def load(self, policy: Policy) -> None:
        with _reporting("load the weights"):
            if self._is_asleep:
                self._llm.wake_up(tags=["weights"])
            if self._lora_rank is None:
                weights = ((name, weight.detach()) for name, weight in causal_model(policy.model).named_parameters())
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
                if policy.device.type == "cpu":
                    self._llm.collective_rpc("pack_heads")
            else:
                write_adapter(policy, Path(self._folder.name))
                self._llm.llm_engine.add_lora(self._adapter(load_inplace=True))
            if self._is_asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._is_asleep = False
        if not self._llm.reset_prefix_cache():
            raise VllmError("vLLM could not clear its prefix cache, which holds results of the old weights.")
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        with _reporting("complete the prompts of this step"):
            outputs = self._llm.generate(
                [self._prompt(request) for request in requests],
                [self._sampling_params(**request.params) for request in requests],
                use_tqdm=False,
                lora_request=None if self._lora_rank is None else self._adapter(),
            )
        return [Answer(output.prompt_token_ids, list(map(_sampled, _in_order(output.outputs)))) for output in outputs]

    def rest(self) -> None:
        if self._sleeps:
            # Level 2 drops the weights, which the next load replaces; adapters still need the base weights.
            self._llm.sleep(level=2 if self._lora_rank is None else 1)
            self._is_asleep = True

    def _adapter(self, *, load_inplace: bool = False) -> Any:
        """The adapter to use in a request."""
        return self._lora_request(ADAPTER, 1, self._folder.name, load_inplace=load_inplace)

    def _prompt(self, request: Request) -> Any:
        """Tokens with one placeholder per image, and the features of all images."""
        prompt = request.prompt
        ids = collapsed(prompt, self._processor)
        if request.features is None:
            return self._tokens_prompt(prompt_token_ids=ids)
        images = as_shared(self._processor.family).vllm_images(prompt, request.features.cpu())
        return self._tokens_prompt(prompt_token_ids=ids, multi_modal_data={"image": images})


@contextmanager
def _reporting(action: str) -> Iterator[None]:
    """Raise vLLM's errors as VllmError, with what it failed to do."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise VllmError(f"vLLM could not {action}: {error}") from error


def not_installed(reason: object) -> str:
    """The message if vLLM cannot be imported."""
    return (
        f"rollout.engine is vllm, but vLLM cannot be imported ({reason}): install it with `pip install "
        "'medvqa-rl[vllm]'`, set vllm.mode=server with a server that runs elsewhere, or rollout.engine=eager."
    )


def engine_arguments(policy: Policy, config: VllmConfig, *, rank: int, num_ranks: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``."""
    processor = policy.processor
    arguments: dict[str, Any] = {
        "model": model_folder(policy),
        "dtype": dtype_of(policy),
        "seed": rank,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_sleep_mode": config.sleep,
        "generation_config": "vllm",  # the model's own would change the sampling parameters
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
        "enable_prefix_caching": True,  # completions share their prompt; images are identified by content
        "enable_mm_embeds": True,
        "mm_processor_cache_gb": 0,  # features need no processor
        "mm_processor_kwargs": as_shared(processor.family).vllm_processor_arguments(processor.image_processor),
        "limit_mm_per_prompt": {"video": 0},
    }
    if config.max_model_length is not None:
        arguments["max_model_len"] = config.max_model_length
    if num_ranks > 1:
        arguments["distributed_executor_backend"] = "external_launcher"  # the training processes are its workers
    lora_rank = adapter_rank(policy)
    if lora_rank is not None:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_lora_rank(lora_rank)}
    if policy.device.type == "cpu":
        # Its CPU build refuses seeds with chunked prefill. Compiling takes longer than it saves at such speeds.
        arguments |= {"enable_chunked_prefill": False, "enforce_eager": True, "worker_extension_cls": EXTENSION}
    return arguments


def _in_order(outputs: Sequence[Any]) -> list[Any]:
    """Sort the completions of a prompt by index."""
    return sorted(outputs, key=lambda output: output.index)


def _sampled(output: Any) -> Sampled:
    """Convert a ``vllm.CompletionOutput``."""
    ids = tuple(output.token_ids)
    found = (position.get(id) for position, id in zip(output.logprobs, ids, strict=True))
    logps = tuple(known(None if logprob is None else logprob.logprob) for logprob in found)
    return Sampled(ids, logps, output.finish_reason)
