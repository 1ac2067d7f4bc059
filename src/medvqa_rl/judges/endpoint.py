"""A model behind an OpenAI-compatible endpoint as judge. The only judge that anything leaves the machine for.

The client's package (extra ``judge``) is imported when such a judge is loaded. Retries are ours, so that the number
of requests, their waiting and their cost are known: throttling (429, with ``Retry-After``), server errors, time-outs,
broken connections and answers that are no chat completion are tried again; every other refusal is not.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from medvqa_rl.config import JudgeConfig
from medvqa_rl.judges.prompts import PROBES, JudgePrompt, chat_text
from medvqa_rl.judges.protocol import NO_REASONING, JudgeIdentity, JudgeRequest, Verdict
from medvqa_rl.randomness import address, uniforms

MAX_WAIT = 60.0
"""Seconds between two attempts at most, whatever the server asks for."""
_TOKENS = 8
"""Tokens of an answer: one word, with room for white space and a full stop."""
_RETRIED = (408, 409, 425, 429)

PROMPT = JudgePrompt("endpoint", chat_text, "Yes", "No", False)


class JudgeUnusable(ValueError):
    """The endpoint refuses requests as such: wrong address, key or model."""


def parse_verdict(text: str | None) -> float:
    """1 for Yes, 0 for No, NaN for anything else. Case, white space around and one full stop do not matter; every
    other character does, so that "Yes, but" and "No way to tell" fail instead of being guessed at."""
    word = (text or "").strip().removesuffix(".").rstrip().lower()
    return {"yes": 1.0, "no": 0.0}.get(word, math.nan)


def wait_before(attempt: int, retry_after: str | None) -> float:
    """Seconds to wait before attempt number ``attempt`` (1 is the first repetition): what the server asks for where
    it says so in seconds, else 0.5 * 2^(attempt - 1) with up to a quarter more, so that clients do not come in step.
    At most :data:`MAX_WAIT`."""
    try:
        asked = float(retry_after) if retry_after is not None else math.nan
    except ValueError:
        asked = math.nan  # an HTTP date: rare, and the growing wait does as well
    if math.isfinite(asked) and asked >= 0:
        return min(asked, MAX_WAIT)
    jitter = float(uniforms(address("judge wait", threading.get_ident(), attempt), 1)[0])
    return min(0.5 * 2.0 ** (attempt - 1) * (1 + jitter / 4), MAX_WAIT)


class EndpointJudge:
    """Asks an endpoint for one word per request, several at a time."""

    def __init__(self, config: JudgeConfig, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """
        Args:
            config: ``endpoint`` is set.
            sleep: waits between attempts.

        Raises:
            ValueError: the client's package or the key is missing.
        """
        assert config.endpoint is not None
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ValueError(
                "judge.endpoint is set, which needs the package openai: install it with "
                "`pip install 'medvqa-rl[judge]'`."
            ) from error
        self._openai, self._config, self._sleep = openai, config, sleep
        self._client = openai.OpenAI(
            base_url=config.endpoint,
            api_key=_read_key(config.api_key_env),
            timeout=config.timeout,
            max_retries=0,
            # A redirect would send the texts to a host that nobody named.
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )
        # The client takes these from the environment, whatever the endpoint.
        self._client.organization = self._client.project = None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.identity = JudgeIdentity(config.model, f"{host_of(config.endpoint)}/{config.model}", PROMPT.hash, 0.0)

    @property
    def counters(self) -> Mapping[str, float]:
        """``asked``, ``failed``, ``requests`` (attempts included), ``retries``, ``prompt_tokens`` and
        ``completion_tokens`` as the endpoint counts them."""
        return dict(self._counts)

    def check(self) -> None:
        """Ask once, to know before training that the endpoint answers.

        Raises:
            ValueError: it cannot be reached or refuses; the message says what it said.
        """
        verdict = self.judge([PROBES[0]])[0]
        if math.isnan(verdict.value):
            raise JudgeUnusable(
                f"The judge {self._config.model!r} at {host_of(str(self._config.endpoint))} does not answer as it "
                f"should ({verdict.reason}): check judge.endpoint, judge.model and judge.api_key_env."
            )

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """One verdict per request. What cannot be had is a failed verdict that says why; nothing is raised for it."""
        with ThreadPoolExecutor(max_workers=self._config.concurrency) as pool:
            verdicts = list(pool.map(self._ask, requests))
        self._count(asked=len(requests), failed=sum(math.isnan(verdict.value) for verdict in verdicts))
        return verdicts

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self._counts.update(numbers)

    def _ask(self, request: JudgeRequest) -> Verdict:
        if not request.reasoning.strip():
            return NO_REASONING
        openai, reason = self._openai, ""
        for attempt in range(self._config.max_retries + 1):
            retry_after: str | None = None
            self._count(requests=1, retries=int(attempt > 0))
            try:
                answer = self._client.chat.completions.create(
                    model=self._config.model,
                    messages=[{"role": "user", "content": PROMPT.render(request)}],
                    temperature=0.0,
                    max_tokens=_TOKENS,
                )
                return self._read(answer)
            except openai.APIStatusError as error:
                reason = f"HTTP {error.status_code}"
                if error.status_code not in _RETRIED and error.status_code < 500:
                    return Verdict.failed(f"{reason}: {_first_line(error.message)}")
                retry_after = error.response.headers.get("retry-after")
            except openai.APITimeoutError:
                reason = f"no answer within {self._config.timeout:g} seconds"
            except openai.APIConnectionError as error:
                reason = f"no connection: {_first_line(str(error.__cause__ or error))}"
            except (openai.APIResponseValidationError, _Malformed, ValueError) as error:
                reason = f"the answer is no chat completion: {_first_line(str(error))}"
            if attempt < self._config.max_retries:
                self._sleep(wait_before(attempt + 1, retry_after))
        tries = self._config.max_retries + 1
        return Verdict.failed(f"{reason} (tried {tries} times)" if tries > 1 else reason)

    def _read(self, answer: Any) -> Verdict:
        """The verdict in a chat completion."""
        openai = self._openai
        choices = answer.choices if isinstance(answer, openai.types.chat.ChatCompletion) else None
        if not choices or choices[0].message is None:
            raise _Malformed("it has no choices")
        usage = answer.usage
        if usage is not None:
            self._count(
                prompt_tokens=usage.prompt_tokens or 0,
                completion_tokens=usage.completion_tokens or 0,
            )
        text = choices[0].message.content
        value = parse_verdict(text)
        if math.isnan(value):
            return Verdict.failed(f"the answer is neither Yes nor No: {_first_line(repr(text))}")
        return Verdict(value)


class _Malformed(RuntimeError):
    """An answer that is no chat completion."""


def _read_key(variable: str | None) -> str:
    """The key from the environment. Without a variable's name none is sent (the client wants some text)."""
    if variable is None:
        return "none"
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(
            f"judge.api_key_env is {variable}, but the environment has no such variable: set it to the key (never "
            "write keys into files), or set judge.api_key_env to null for an endpoint without keys."
        )
    return key


def host_of(url: str) -> str:
    """Host and port of a URL, without user and password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else ""
