"""A running vLLM server (``vllm.mode: server``). Not yet run on a GPU; see rollout/vllm/engine.py.

Each rank sends its own prompts. Only the main rank updates the weights, through a folder on a shared file system.
Images are sent as PNG, so the server resizes and encodes them again.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medvqa_rl.config import VllmConfig
from medvqa_rl.core.files import writing
from medvqa_rl.core.progress import waiting
from medvqa_rl.core.text import shown
from medvqa_rl.core.types import ImageSource
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.vllm.agreement import VllmError
from medvqa_rl.rollout.vllm.client import Client
from medvqa_rl.rollout.vllm.engine import (
    Answer,
    Request,
    Sampled,
    adapter_rank,
    collapsed,
    known,
    trained_alongside,
    write_adapter,
)
from medvqa_rl.rollout.vllm.serve import check_server, instance

ADAPTER = "policy"
"""The adapter's name on the server."""
_MAX_CONCURRENT = 64
"""Concurrent requests; the server batches them itself."""


class Server:
    """A ``vllm serve`` process in development mode."""

    takes_features = False

    def __init__(
        self, policy: Policy, config: VllmConfig, *, is_main: bool, wait_for_everyone: Callable[[], None]
    ) -> None:
        """
        Args:
            policy: the model that the server must serve.
            config: the vLLM settings.
            is_main: this rank updates the weights.
            wait_for_everyone: a barrier over all ranks.

        Raises:
            ValueError: the server does not respond, or was started with other settings.
        """
        assert config.server_url is not None
        alongside = trained_alongside(policy)
        if alongside:
            raise ValueError(
                f"vllm.mode is server, but {', '.join(alongside)} are trained in addition to the adapter, which vLLM "
                "cannot load: set model.train_vision and model.train_projector to false, train without model.lora, or "
                "set vllm.mode=colocate."
            )
        self._client = Client(config.server_url, config.timeout)
        self._wait_for_everyone = wait_for_everyone
        self._policy = policy
        self._processor = policy.processor
        self._lora_rank = adapter_rank(policy)
        self._folder = TemporaryDirectory(prefix="medvqa-rl-", dir=config.weights_dir) if is_main else None
        try:
            self._start()
        except VllmError as error:
            raise ValueError(f"The weights of {policy.config.path} could not be loaded again: {error}") from error

    def _start(self) -> None:
        """Check a server that was started, and load the original weights below an adapter: it may have served a run
        that trained them. Full fine-tuning hands all weights over anyway."""
        self._served = check_server(self._client, self._policy)
        if self._folder is not None and self._lora_rank is not None:
            self._reload(self._served.model)

    def _reload(self, weights: str) -> None:
        """Load a model's weights from a folder or the Hub."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": weights}}
        self._client.ask("POST", "/collective_rpc", call)
        if self._served.is_packed:
            self._client.ask("POST", "/collective_rpc", {"method": "pack_heads"})

    def load(self, policy: Policy) -> None:
        if instance(self._client) != self._served.instance:
            try:
                self._start()
            except ValueError as error:  # with other settings than before
                raise VllmError(str(error)) from error
        if self._folder is not None:
            folder = Path(self._folder.name).resolve()
            if self._lora_rank is None:
                with writing(folder):
                    write_model(policy, folder)
                self._reload(str(folder))
            else:
                write_adapter(policy, folder)
                named = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
                self._client.ask("POST", "/v1/load_lora_adapter", named)
            if not self._client.ask("POST", "/reset_prefix_cache")["success"]:
                raise VllmError(
                    f"The vLLM server at {self._client.url} could not clear its prefix cache, which holds results "
                    "of the old weights: use the server for this run only while it trains."
                )
            self._client.ask("POST", "/reset_mm_cache")
            self._client.ask("POST", "/reset_encoder_cache")
        self._wait_for_everyone()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        with (
            waiting(f"waiting for the vLLM server at {self._client.url}"),
            ThreadPoolExecutor(max_workers=min(_MAX_CONCURRENT, len(requests))) as pool,
        ):
            answers = list(pool.map(self._generate, requests))
        if instance(self._client) != self._served.instance:
            raise VllmError(
                f"The vLLM server at {self._client.url} was restarted during the rollout, so that its completions may "
                "come from other weights: continue the run with --resume."
            )
        return answers

    def rest(self) -> None:
        """Does nothing: the server's owner decides when it sleeps."""

    def _generate(self, request: Request) -> Answer:
        body: dict[str, Any] = {
            "token_ids": collapsed(request.prompt, self._processor),
            "sampling_params": request.params,
            "return_token_ids": True,
        }
        if request.sample.images:
            body["content_parts"] = [{"type": "image_url", "url": as_url(image)} for image in request.sample.images]
        if self._lora_rank is not None:
            body["model"] = ADAPTER
        answer = self._client.ask("POST", "/inference/v1/generate", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            return Answer(answer["prompt_token_ids"], [_sampled(choice) for choice in choices])
        except (KeyError, TypeError, ValueError) as error:
            raise VllmError(
                f"The vLLM server at {self._client.url} returned an unexpected response ({shown(error)})."
            ) from error


def as_url(source: ImageSource) -> str:
    """Encode an image as a ``data:`` URL."""
    buffer = io.BytesIO()
    source.load().save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _sampled(choice: dict[str, Any]) -> Sampled:
    """Convert a choice of ``/inference/v1/generate``."""
    ids = tuple(choice["token_ids"])
    logps = tuple(known(entry["logprob"]) for entry in choice["logprobs"]["content"])
    if len(ids) != len(logps):
        raise ValueError(f"{len(ids)} tokens with {len(logps)} log-probabilities")
    return Sampled(ids, logps, choice["finish_reason"])
