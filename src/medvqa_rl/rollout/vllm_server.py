"""A running vLLM server (``vllm.mode: server``). Not yet run against a real one; see rollout/vllm.py.

Each rank sends its own prompts. Only the main rank updates the weights, through a folder on a shared file system.
Images are sent as PNG, so the server resizes and encodes them again.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from medvqa_rl.config import VllmConfig
from medvqa_rl.core.progress import waiting
from medvqa_rl.core.text import printable, shown
from medvqa_rl.core.types import ImageSource
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.loading import Policy, resolve_folder
from medvqa_rl.rollout.vllm import (
    Answer,
    Request,
    Sampled,
    VllmError,
    adapter_rank,
    collapsed,
    known,
    max_lora_rank,
    trained_alongside,
    write_adapter,
)

ADAPTER = "policy"
"""The adapter's name on the server."""
_MAX_CONCURRENT = 64
"""Concurrent requests; the server batches them itself."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirects, which could send images to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Client:
    """A minimal HTTP client for JSON requests."""

    def __init__(self, url: str, timeout: float) -> None:
        """
        Args:
            url: of the server.
            timeout: seconds per request.
        """
        self.url, self._timeout = url.rstrip("/"), timeout
        # No proxy, so that data goes to this server only.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def ask(self, method: Literal["GET", "POST"], path: str, body: Any = None) -> Any:
        """Send a request and return the JSON of its response, or None if it has none.

        Raises:
            VllmError: there is no response, or it is an error.
        """
        data = None if method == "GET" else json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}, method=method
        )
        where = f"The vLLM server at {self.url}"
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                text = response.read()
                is_json = response.headers.get_content_type() == "application/json"
        except urllib.error.HTTPError as error:
            said = printable(error.read(300).decode("utf-8", "replace").strip(), 300)
            raise VllmError(f"{where} answers {path} with HTTP {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise VllmError(f"{where} does not answer {path}: {reason or type(error).__name__}.") from error
        try:
            return json.loads(text) if is_json else None
        except ValueError as error:
            raise VllmError(f"{where} answers {path} with invalid JSON ({printable(str(error))}).") from error


def check_answers(config: VllmConfig) -> None:
    """Check that the server responds, before a model is loaded.

    Raises:
        ValueError: it does not.
    """
    assert config.server_url is not None
    try:
        Client(config.server_url, 20.0).ask("GET", "/health")
    except VllmError as error:
        raise ValueError(
            f"vllm.server_url is {config.server_url}, but no vLLM server can be used there: {error} Start one as "
            "docs/vllm.md says, or set vllm.mode=colocate."
        ) from error


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
        self._client = Client(config.server_url, config.timeout)
        self._wait_for_everyone = wait_for_everyone
        self._processor = policy.processor
        self._lora_rank = adapter_rank(policy)
        self._check(policy)
        self._folder = TemporaryDirectory(prefix="medvqa-rl-", dir=config.weights_dir) if is_main else None

    def _check(self, policy: Policy) -> None:
        """Compare the server's settings with those that training needs."""
        command = serve_command(policy)
        alongside = trained_alongside(policy)
        if alongside:
            raise ValueError(
                f"vllm.mode is server, but {', '.join(alongside)} are trained in addition to the adapter, which vLLM "
                "cannot load: set model.train_vision and model.train_projector to false, train without model.lora, or "
                "set vllm.mode=colocate."
            )
        try:
            config = self._client.ask("GET", "/server_info?config_format=json")["vllm_config"]
            model, lora = config["model_config"], config["lora_config"]
            served, mode = model["model"], model["logprobs_mode"]
        except (VllmError, KeyError, TypeError) as error:
            raise ValueError(
                f"vllm.server_url is {self._client.url}, but no vLLM server in development mode answers there "
                f"({printable(str(error))}): start it with `{command}`."
            ) from error
        if served not in (policy.config.path, _folder(policy)):
            raise ValueError(
                f"The vLLM server serves {served}, but model.path is {policy.config.path}: start it with `{command}`."
            )
        if mode != "processed_logprobs":
            raise ValueError(
                f"The vLLM server reports {mode}, which are not of the distribution that it samples from: start it "
                f"with `{command}`."
            )
        if self._lora_rank is not None and (lora is None or lora["max_lora_rank"] < self._lora_rank):
            has = "takes no adapters" if lora is None else f"takes adapters of rank {lora['max_lora_rank']} at most"
            raise ValueError(
                f"The vLLM server {has}, but one of rank {self._lora_rank} is trained: start it with `{command}`."
            )

    def load(self, policy: Policy) -> None:
        if self._folder is not None:
            folder = Path(self._folder.name).resolve()
            if self._lora_rank is None:
                write_model(policy, folder)
                call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                self._client.ask("POST", "/collective_rpc", call)
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
            return list(pool.map(self._generate, requests))

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


def serve_command(policy: Policy) -> str:
    """The command that starts a matching server."""
    processor = policy.processor
    pixels = json.dumps(processor.family.vllm_processor_arguments(processor.image_processor))
    words = ["VLLM_SERVER_DEV_MODE=1", "VLLM_NO_USAGE_STATS=1", "vllm", "serve", shlex.quote(_folder(policy))]
    words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    words += ["--mm-processor-kwargs", shlex.quote(pixels)]
    lora_rank = adapter_rank(policy)
    if lora_rank is not None:
        words.insert(0, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
        words += ["--enable-lora", "--max-lora-rank", str(max_lora_rank(lora_rank))]
    return " ".join(words)


def _folder(policy: Policy) -> str:
    """The model's folder."""
    return str(resolve_folder(policy.config.path, policy.config.revision))


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
