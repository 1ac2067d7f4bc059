"""A model behind an OpenAI-compatible endpoint as judge. The only judge that anything leaves the machine for.

The client's package (extra ``judge``) is imported when such a judge is loaded. Retries are ours, so that the number
of requests, their waiting and their cost are known: throttling (429, with ``Retry-After``), server errors, time-outs,
broken connections and answers that are no chat completion are tried again; every other refusal is not.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from medvqa_rl.config import JudgeConfig
from medvqa_rl.core.randomness import address, uniforms
from medvqa_rl.rewards.judges.prompts import PROBES, JudgePrompt, chat_text
from medvqa_rl.rewards.judges.protocol import NO_REASONING, JudgeIdentity, JudgeRequest, Verdict
from medvqa_rl.rewards.judges.rubric import MAX_TOKENS, Grade, GradeRequest, Rubric, parse_grade
from medvqa_rl.rewards.judges.rubric import PROBES as GRADE_PROBES

MAX_WAIT = 60.0
"""Seconds between two attempts at most, whatever the server asks for."""
_TOKENS = 8
"""Tokens of an answer: one word, with room for white space and a full stop."""
_RETRIED = (408, 409, 425, 429)

PROMPT = JudgePrompt("endpoint", chat_text, "Yes", "No", False)


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


class Answer(NamedTuple):
    """What came back for one message."""

    text: str | None
    failure: str = ""
    """Why nothing came; empty where something did."""


class Endpoint:
    """Sends messages to a server, several at a time."""

    def __init__(self, config: JudgeConfig, key: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """
        Args:
            config: ``endpoint`` is set.
            key: sent with every request.
            sleep: waits between attempts.

        Raises:
            ValueError: the client's package is missing.
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
            api_key=key,
            timeout=config.timeout,
            max_retries=0,
            # A redirect would send the texts to a host that nobody named.
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )
        # The client takes these from the environment, whatever the endpoint.
        self._client.organization = self._client.project = None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.host = host_of(config.endpoint)

    @property
    def counters(self) -> Mapping[str, float]:
        """``requests`` (attempts included), ``retries``, ``prompt_tokens`` and ``completion_tokens`` as the endpoint
        counts them, and what was counted besides."""
        return dict(self._counts)

    def identity(self, prompt_hash: str) -> JudgeIdentity:
        """Of a judge that asks this endpoint's model with some prompt."""
        return JudgeIdentity(self._config.model, f"{self.host}/{self._config.model}", prompt_hash, 0.0)

    def count(self, **numbers: int) -> None:
        """Add to the counters."""
        with self._lock:
            self._counts.update(numbers)

    def ask(self, texts: Sequence[str], max_tokens: int) -> list[Answer]:
        """One answer per message, at temperature 0. What cannot be had is an answer that says why; nothing is raised
        for it."""
        with ThreadPoolExecutor(max_workers=self._config.concurrency) as pool:
            return list(pool.map(partial(self._ask, max_tokens=max_tokens), texts))

    def unusable(self, reason: str) -> ValueError:
        """What to raise where the first answer shows that the endpoint cannot be used."""
        return ValueError(
            f"The judge {self._config.model!r} at {self.host} does not answer as it should ({reason}): check "
            "judge.endpoint, judge.model and judge.api_key_env."
        )

    def _ask(self, text: str, max_tokens: int) -> Answer:
        openai, reason = self._openai, ""
        for attempt in range(self._config.max_retries + 1):
            retry_after: str | None = None
            self.count(requests=1, retries=int(attempt > 0))
            try:
                answer = self._client.chat.completions.create(
                    model=self._config.model,
                    messages=[{"role": "user", "content": text}],
                    temperature=0.0,
                    max_tokens=max_tokens,
                )
                return Answer(self._read(answer))
            except openai.APIStatusError as error:
                reason = f"HTTP {error.status_code}"
                if error.status_code not in _RETRIED and error.status_code < 500:
                    return Answer(None, f"{reason}: {_first_line(error.message)}")
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
        return Answer(None, f"{reason} (tried {tries} times)" if tries > 1 else reason)

    def _read(self, answer: Any) -> str | None:
        """The text in a chat completion."""
        openai = self._openai
        choices = answer.choices if isinstance(answer, openai.types.chat.ChatCompletion) else None
        if not choices or choices[0].message is None:
            raise _Malformed("it has no choices")
        usage = answer.usage
        if usage is not None:
            self.count(prompt_tokens=usage.prompt_tokens or 0, completion_tokens=usage.completion_tokens or 0)
        text: str | None = choices[0].message.content
        return text


class EndpointJudge:
    """Asks an endpoint for Yes or No."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.identity = endpoint.identity(PROMPT.hash)

    @property
    def counters(self) -> Mapping[str, float]:
        """``asked``, ``failed`` and those of the endpoint."""
        return self._endpoint.counters

    def check(self) -> None:
        """Ask once, to know before training that the endpoint answers.

        Raises:
            ValueError: it cannot be reached or refuses; the message says what it said.
        """
        verdict = self.judge([PROBES[0]])[0]
        if math.isnan(verdict.value):
            raise self._endpoint.unusable(verdict.reason)

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """One verdict per request; reasoning without text is No and is not sent."""
        shown = [index for index, request in enumerate(requests) if request.reasoning.strip()]
        answers = self._endpoint.ask([PROMPT.render(requests[index]) for index in shown], _TOKENS)
        verdicts = [NO_REASONING] * len(requests)
        for index, answer in zip(shown, answers):
            verdicts[index] = _read_verdict(answer)
        self._endpoint.count(asked=len(requests), failed=sum(math.isnan(verdict.value) for verdict in verdicts))
        return verdicts


def _read_verdict(answer: Answer) -> Verdict:
    if answer.failure:
        return Verdict.failed(answer.failure)
    value = parse_verdict(answer.text)
    if math.isnan(value):
        return Verdict.failed(f"the answer is neither Yes nor No: {_first_line(repr(answer.text))}")
    return Verdict(value)


class EndpointGrader:
    """Asks an endpoint for grades on a rubric."""

    def __init__(self, endpoint: Endpoint, rubric: Rubric) -> None:
        self._endpoint, self._rubric = endpoint, rubric
        self.identity = endpoint.identity(rubric.hash)

    @property
    def counters(self) -> Mapping[str, float]:
        """``asked``, ``failed`` and those of the endpoint."""
        return self._endpoint.counters

    def check(self) -> None:
        """Ask once, to know before training that the endpoint answers in the form that is asked for.

        Raises:
            ValueError: it cannot be reached, refuses, or answers otherwise; the message says what it said.
        """
        grade = self.grade([GRADE_PROBES[0]])[0]
        if math.isnan(grade.score):
            raise self._endpoint.unusable(grade.reason)

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """One grade per request; what has nothing to be graded gets 0 and is not sent."""
        grades = [self._rubric.without_asking(request) for request in requests]
        shown = [index for index, grade in enumerate(grades) if grade is None]
        answers = self._endpoint.ask([self._rubric.render(requests[index]) for index in shown], MAX_TOKENS)
        for index, answer in zip(shown, answers):
            grades[index] = Grade.failed(answer.failure) if answer.failure else parse_grade(answer.text)
        done = [grade for grade in grades if grade is not None]
        assert len(done) == len(requests), "every request has its grade"
        self._endpoint.count(asked=len(requests), failed=sum(math.isnan(grade.score) for grade in done))
        return done


class _Malformed(RuntimeError):
    """An answer that is no chat completion."""


def host_of(url: str) -> str:
    """Host and port of a URL, without user and password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else ""
