"""A model behind an OpenAI-compatible endpoint as judge: the only judge that sends anything off this machine.

The client's package (extra ``judge``) is imported when such a judge is loaded. Retries are done here rather than by
the client, so that requests, waits and cost are counted: throttling (429, with ``Retry-After``), server errors,
time-outs, broken connections and replies that are not chat completions are retried; every other refusal is not.

The server is asked to write nothing but a readable verdict (:attr:`Rubric.constraint`). Where it refuses that request
when the judge is loaded, the judge asks without, until it is loaded again.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import ssl
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from medvqa_rl.config import JudgeConfig
from medvqa_rl.core.network import is_on_this_machine, unusable_proxy
from medvqa_rl.core.progress import waiting
from medvqa_rl.core.randomness import address, uniforms
from medvqa_rl.core.text import printable
from medvqa_rl.data.images.files import shrunk
from medvqa_rl.rewards.judges.prompts import ENDPOINT
from medvqa_rl.rewards.judges.protocol import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.replies import MalformedReply, OutOfTime, bounded_client, read_completion, read_models
from medvqa_rl.rewards.judges.rubric import Rubric

MAX_WAIT = 60.0
"""Longest wait between two attempts in seconds, whatever the server requests."""
MIN_KEY = 8
"""Shorter keys are placeholders such as "none" or "EMPTY", which are ordinary words in a reply."""
_RETRIED = (408, 409, 425, 429)
_CONSTRAINT_REFUSED = ("HTTP 400", "HTTP 422")
"""How servers refuse a field or a schema that they do not know."""


def wait_before(attempt: int, retry_after: str | None) -> float:
    """Seconds to wait before retry number ``attempt`` (from 1): the server's ``Retry-After`` if it is in seconds, else
    0.5 * 2^(attempt - 1) plus up to a quarter of jitter. At most :data:`MAX_WAIT`."""
    try:
        asked = float(retry_after) if retry_after is not None else math.nan
    except ValueError:
        asked = math.nan  # an HTTP date: rare, and the exponential wait does as well
    if math.isfinite(asked) and asked >= 0:
        return min(asked, MAX_WAIT)
    jitter = float(uniforms(address("judge wait", threading.get_ident(), attempt), 1)[0])
    return min(0.5 * 2.0 ** (attempt - 1) * (1 + jitter / 4), MAX_WAIT)


class EndpointJudge:
    """Grades on a rubric by asking a server, with several requests in flight."""

    def __init__(
        self, config: JudgeConfig, key: str, rubric: Rubric, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """
        Args:
            config: its ``endpoint`` is set.
            key: sent with every request.
            rubric: what to grade.
            sleep: waits between attempts.

        Raises:
            ValueError: the client's package is missing, or cannot use the environment's proxy.
        """
        assert config.endpoint is not None
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ValueError(
                "judge.endpoint is set, which needs the package openai: install it with "
                "`pip install 'medvqa-rl[judge]'`."
            ) from error
        self._openai, self._config, self._rubric, self._sleep = openai, config, rubric, sleep
        self._client = openai.OpenAI(
            base_url=config.endpoint,
            api_key=key,
            timeout=config.timeout,
            max_retries=0,
            # A redirect would send the texts to a host that the user did not name.
            http_client=bounded_client(
                openai.DefaultHttpxClient, config.timeout, follow_redirects=False, **_proxy_options(config.endpoint)
            ),
            default_headers={"Accept-Encoding": "identity"},
        )
        self._key = key
        # The client reads these from the environment, whatever the endpoint.
        self._client.organization = self._client.project = None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._host = host_of(config.endpoint)
        self._constraint = rubric.constraint

    @property
    def identity(self) -> JudgeIdentity:
        """Constrained verdicts have another prompt hash than free ones: a model may say otherwise where it may say
        only that."""
        prompt_hash = ENDPOINT.hash_for(self._rubric) if self._rubric.is_yes_no else self._rubric.hash
        limits = {"max_pixels": self._config.max_pixels} if self._rubric.sees_images else {}
        if self._constraint or limits:
            shown = prompt_hash + "".join(json.dumps(more) for more in (self._constraint, limits) if more)
            prompt_hash = hashlib.sha256(shown.encode()).hexdigest()[:16]
        return JudgeIdentity(self._config.model, f"{self._host}/{self._config.model}", prompt_hash, 0.0)

    @property
    def counters(self) -> Mapping[str, float]:
        """``asked`` and ``failed``, ``requests`` (attempts included), ``retries``, and ``prompt_tokens`` and
        ``completion_tokens`` as reported by the endpoint."""
        return dict(self._counts)

    def check(self, say: Callable[[str], None] = print) -> None:
        """Grade one request, to find out before training whether the endpoint works, and whether it constrains
        replies. If it refuses to, this judge asks without from now on.

        Args:
            say: told once if replies cannot be constrained.

        Raises:
            ValueError: it cannot be reached, does not serve the model, refuses, or replies in another format; the
                message says what came back.
        """
        (grade,) = self.grade(self._rubric.probes[:1])
        if grade.is_scored:
            return
        self._check_sight(grade)
        refusal, constraint = "", self._constraint
        if grade.reason.startswith(_CONSTRAINT_REFUSED):
            refusal, self._constraint = grade.reason, {}
            (grade,) = self.grade(self._rubric.probes[:1])
            if grade.is_scored:
                say(
                    f"Notice: the judge {self._config.model!r} at {self._host} refuses {_field(constraint)} "
                    f"({printable(refusal)}), so its {self._rubric.name} verdicts are read from free text, and those "
                    "that cannot be read are unscored."
                )
                return
        if grade.reason.startswith("HTTP 4") and (served := self._served()) and self._config.model not in served:
            raise ValueError(
                f"The server at {self._host} does not serve the judge's model {self._config.model!r}, but "
                f"{', '.join(served[:5])}{' ...' if len(served) > 5 else ''}: set judge.model to a name that it "
                "serves."
            )
        if refusal and not grade.reason.startswith("HTTP"):
            raise ValueError(
                f"The judge {self._config.model!r} at {self._host} refuses {_field(constraint)} ({refusal}), and "
                f"without it does not answer as it should ({grade.reason}): serve it with vLLM or another server that "
                "constrains replies, or set judge.model to a model that follows instructions."
            )
        raise ValueError(
            f"The judge {self._config.model!r} at {self._host} does not answer as it should ({grade.reason}): "
            "check judge.endpoint, judge.model and judge.api_key_env."
        )

    def _check_sight(self, grade: Grade) -> None:
        """Find out whether it was the image that the server refused.

        Raises:
            ValueError: it grades the same request without its image.
        """
        blind = [replace(self._rubric.probes[0], images=())]
        if self._rubric.sees_images and grade.reason.startswith("HTTP 4") and self.grade(blind)[0].is_scored:
            raise ValueError(
                f"judge.sees is image, but the judge {self._config.model!r} at {self._host} cannot see: it refuses an "
                f"image ({grade.reason}) and grades the same text without: set judge.model to a vision-language "
                "model, or judge.sees to text or description."
            )

    def _served(self) -> list[str]:
        """Names of the models that the server lists; empty if it lists none."""
        try:
            reply = self._client.models.with_raw_response.list()
        except (self._openai.OpenAIError, MalformedReply, OutOfTime):
            return []
        return [printable(self._without_key(name)) for name in read_models(reply.http_response.content)]

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        """Grade requests; a request with nothing to grade gets 0 and is not sent. Failures are grades, never
        raised."""
        grades = self._rubric.grade(requests, self._ask_all)
        self._count(asked=len(requests), failed=sum(not grade.is_scored for grade in grades))
        return grades

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self._counts.update(numbers)

    def _ask_all(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        with (
            waiting(f"waiting for the judge at {self._host}"),
            ThreadPoolExecutor(max_workers=self._config.concurrency) as pool,
        ):
            return list(pool.map(self._ask, requests))

    def _ask(self, request: JudgeRequest) -> Grade:
        openai, reason = self._openai, ""
        try:
            content = self._content(request)
        except ValueError as error:  # an image
            return Grade.failed(printable(str(error)))
        for attempt in range(self._config.max_retries + 1):
            retry_after: str | None = None
            self._count(requests=1, retries=int(attempt > 0))
            try:
                reply = self._client.chat.completions.with_raw_response.create(
                    model=self._config.model,
                    messages=[{"role": "user", "content": content}],
                    temperature=0.0,
                    max_tokens=self._rubric.max_tokens,
                    extra_body=self._constraint,
                )
                return self._rubric.parse(self._read(reply.http_response.content))
            except openai.APIStatusError as error:
                reason = f"HTTP {error.status_code}"
                if error.status_code not in _RETRIED and error.status_code < 500:
                    message = error.message.removeprefix(f"Error code: {error.status_code} - ")
                    return Grade.failed(f"{reason}: {_first_line(self._without_key(message))}")
                retry_after = error.response.headers.get("retry-after")
            except (openai.APITimeoutError, OutOfTime):
                reason = f"no answer within {self._config.timeout:g} seconds"
            except openai.APIConnectionError as error:
                reason = f"no connection: {_first_line(str(error.__cause__ or error))}"
            except MalformedReply as error:
                reason = f"the answer is no chat completion: {error}"
            if attempt < self._config.max_retries:
                self._sleep(wait_before(attempt + 1, retry_after))
        tries = self._config.max_retries + 1
        return Grade.failed(f"{reason} (tried {tries} times)" if tries > 1 else reason)

    def _content(self, request: JudgeRequest) -> Any:
        """The message: text, or images followed by text.

        Raises:
            ValueError: an image cannot be decoded.
        """
        text = self._rubric.render(request)
        images = [_data_url(shrunk(seen.image, self._config.max_pixels)) for seen in self._rubric.images(request)]
        if not images:
            return text
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        return [*parts, {"type": "text", "text": text}]

    def _read(self, body: bytes) -> str | None:
        """Count the tokens of a chat completion and return its text."""
        reply = read_completion(body)
        self._count(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
        return reply.text and self._without_key(reply.text)

    def _without_key(self, text: str) -> str:
        """The text without the key, which a server may repeat: reasons are stored with the samples."""
        return text.replace(self._key, "[key]") if len(self._key) >= MIN_KEY else text


def _proxy_options(endpoint: str) -> dict[str, Any]:
    """Options of the HTTP client: the environment's proxy, but never for a server on this machine."""
    if is_on_this_machine(endpoint):
        # Not reading the environment leaves out its certificates too; ssl reads them itself.
        return {"trust_env": False, "verify": ssl.create_default_context()}
    proxy = unusable_proxy()
    if proxy is not None:
        raise ValueError(
            f"judge.endpoint is on {host_of(endpoint)}, but the proxy in the environment's {proxy} cannot be used: "
            "for SOCKS, install the package socksio and write socks5://, or unset the variable."
        )
    return {}


def _data_url(image: Image.Image) -> str:
    """An image as PNG with nothing but its pixels."""
    file = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def _field(constraint: Mapping[str, Any]) -> str:
    """The field of a request that constrains the reply."""
    return next(iter(constraint))


def host_of(url: str) -> str:
    """Host and port of a URL, without user and password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _first_line(text: str) -> str:
    lines = text.strip()[:1000].splitlines()
    return lines[0][:200] if lines else ""
