"""Requests that arrive one by one, each with its own sampling settings, in one batch.

:class:`OnlineEngine` decodes in a thread of its own. A request joins the batch at the next step and leaves it when its
last completion ends. Its uniforms are addressed by its seed and its prompt, so what it gets does not depend on the
requests beside it, up to rounding.
"""

from __future__ import annotations

import hashlib
import math
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medvqa_rl.core.types import EncodedPrompt
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.prefix.prefill import prefill
from medvqa_rl.rollout.decode import DIVERGED, evaluating, stop_tokens, suppressed_tokens
from medvqa_rl.rollout.sampling import uniform_table
from medvqa_rl.rollout.state import Capacity, DecodeState, Owner
from medvqa_rl.rollout.step import Picker, Sampling, append_tokens, next_logits

GREEDY = (1.0, float(np.finfo(np.float64).tiny))
"""Temperature and top-p that keep only the most likely token, in a tie the one that :func:`pick_greedy` takes."""
MAX_PREFILL = 8
"""Most prompts that join the batch in one step: the running completions wait for their prefill."""
OUT_OF_MEMORY = (
    "The memory of the device is full: send fewer or smaller images, or start the server with a smaller --max-batch."
)
_UNFINISHED = "\ufffd"
"""How an incomplete character at the end of a completion is decoded."""


class TokenLogprob(NamedTuple):
    """A token with its log-probability, of the model's distribution without suppression, temperature and top-p."""

    token: int
    logp: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens, in descending order."""


class Piece(NamedTuple):
    """The next part of a completion."""

    completion: int
    """Its number among those of the request."""
    text: str
    num_tokens: int
    """That the piece adds, the one that ended the completion included."""
    logprobs: tuple[TokenLogprob, ...]
    """Of these tokens, if asked for."""
    finish: Literal["stop", "length"] | None
    """Why the completion ends with this piece; None if it does not."""


class Failed(NamedTuple):
    """A request ends without an answer."""

    message: str
    is_closed: bool = False
    """Because the engine was closed."""


@dataclass(eq=False)
class Request:
    """What to complete, and how."""

    prompt: EncodedPrompt
    send: Callable[[Piece | Failed], None]
    """Called in the engine's thread with each piece."""
    max_length: int
    """Most tokens of a completion."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    seed: int = 0
    num_generations: int = 1
    stop: tuple[str, ...] = ()
    """A completion ends before the first of these texts."""
    top_logprobs: int | None = None
    """Most likely tokens to report with each token; None reports no log-probabilities."""
    is_streamed: bool = False
    """Send pieces as they come, not each completion at its end."""
    is_cancelled: bool = False
    """Set from any thread to end the request without another piece."""

    @property
    def sampling(self) -> tuple[float, float]:
        """Temperature and top-p; infinity keeps every token."""
        if self.temperature == 0:
            return GREEDY
        return self.temperature, self.top_p if self.top_p < 1 else math.inf


@dataclass(eq=False)
class _Sequence:
    """A completion being decoded."""

    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_sent: int = 0
    """Tokens sent."""
    text_sent: int = 0
    """Characters sent."""
    is_done: bool = False

    def piece(self, text: str, finish: Literal["stop", "length"] | None) -> Piece:
        """What was not sent yet."""
        new = slice(self.num_sent, None)
        piece = Piece(self.index, text[self.text_sent :], len(self.tokens[new]), tuple(self.logprobs[new]), finish)
        self.num_sent, self.text_sent = len(self.tokens), max(self.text_sent, len(text))
        return piece


class OnlineEngine:
    """Completes requests of any thread in the thread that calls :meth:`run`."""

    def __init__(self, policy: Policy, *, max_sequences: int, max_length: int) -> None:
        """
        Args:
            policy: of a family with the fast path; :class:`GenerateOnline` takes others.
            max_sequences: most completions in the batch.
            max_length: most tokens of a completion.
        """
        self.max_sequences, self.max_length = max_sequences, max_length
        self._policy = policy
        self._suppressed, self._stop = suppressed_tokens(policy), stop_tokens(policy)
        self._inbox: SimpleQueue[Request | None] = SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._running: dict[int, list[_Sequence]] = {}
        """The sequences of each request in the batch, by its number."""
        self._num_admitted = 0
        self._state: DecodeState | None = None

    def submit(self, request: Request) -> None:
        """Add a request, from any thread."""
        assert 0 < request.num_generations <= self.max_sequences and 0 < request.max_length <= self.max_length
        self._inbox.put(request)

    def close(self) -> None:
        """End :meth:`run`, from any thread; what is running or waiting fails."""
        self._inbox.put(None)

    def run(self) -> None:
        """Complete requests until :meth:`close`."""
        with torch.no_grad(), evaluating(self._policy.model):
            while self._receive():
                try:
                    self._step()
                except FloatingPointError as error:
                    self._fail_running(str(error))
                except torch.OutOfMemoryError:
                    self._fail_running(OUT_OF_MEMORY)
                except Exception:  # noqa: BLE001  (a defect fails the requests that met it, not the server)
                    traceback.print_exc()
                    self._fail_running("The server met a defect, which it wrote to its standard error.")
        self._fail_running("The server was stopped.", is_closed=True)
        while self._waiting:
            self._waiting.popleft().send(Failed("The server was stopped.", is_closed=True))

    def _receive(self) -> bool:
        """Take new requests, and wait for one if there is nothing to do; False if the engine is closed."""
        is_idle = not self._running and not self._waiting
        try:
            while True:
                request = self._inbox.get(block=is_idle)
                if request is None:
                    return False
                self._waiting.append(request)
                is_idle = False
        except Empty:
            return True

    def _step(self) -> None:
        """Let requests join, decode one token of every completion, and send what is new."""
        self._cancel()
        self._remove()
        self._admit()
        state = self._state
        if state is not None and state.num_rows:
            logits = next_logits(self._policy.model, state, state.shape())
            self._append(state, slice(state.num_rows), logits)
            state.count_step()
            self._remove()

    def _cancel(self) -> None:
        """End the completions of requests that are cancelled."""
        for sequences in self._running.values():
            for sequence in sequences:
                sequence.is_done |= sequence.request.is_cancelled

    def _admit(self) -> None:
        """Move waiting requests into the batch, in order, while there is room."""
        new = self._next(self.max_sequences if self._state is None else self._state.free_rows)
        if not new:
            return
        numbers = self._start(new)
        try:
            prefilled, _ = prefill(self._policy, [request.prompt for request in new])
        except torch.OutOfMemoryError:
            for number in numbers:
                self._running.pop(number)[0].request.send(Failed(OUT_OF_MEMORY))
            return
        if self._state is None:
            size, length = self.max_sequences, prefilled.keys[0].shape[2]
            capacity = Capacity(size, size, size, length, self.max_length)
            self._state = DecodeState(self._policy.model, capacity, self._policy.device)
        device = self._policy.device
        owners = [[Owner(number, sequence.index) for sequence in self._running[number]] for number in numbers]
        uniforms = torch.from_numpy(np.concatenate([self._uniforms(request) for request in new])).to(device)
        added = self._state.admit(prefilled, owners, uniforms)
        repeats = torch.tensor([request.num_generations for request in new], device=device)
        self._append(self._state, added, prefilled.logits.repeat_interleave(repeats, dim=0))
        self._remove()

    def _next(self, rows: int) -> list[Request]:
        """Take waiting requests whose completions fit a number of rows, at most :data:`MAX_PREFILL`."""
        new: list[Request] = []
        while self._waiting and len(new) < MAX_PREFILL:
            if self._waiting[0].is_cancelled:
                self._waiting.popleft()
                continue
            rows -= self._waiting[0].num_generations
            if rows < 0:
                break
            new.append(self._waiting.popleft())
        return new

    def _start(self, new: Sequence[Request]) -> range:
        """Note that requests are running; returns their numbers."""
        numbers = range(self._num_admitted, self._num_admitted + len(new))
        self._num_admitted += len(new)
        for number, request in zip(numbers, new):
            self._running[number] = [_Sequence(request, index) for index in range(request.num_generations)]
        return numbers

    def _uniforms(self, request: Request) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """(G, L) uniforms, 0 beyond the request's own limit."""
        count = request.num_generations
        uniforms = np.zeros((count, self.max_length))
        if request.temperature > 0:
            id = _prompt_hash(request.prompt)
            uniforms[:, : request.max_length] = uniform_table(
                request.seed, "serve", 0, [id], [0], count, request.max_length
            )
        return uniforms

    def _append(self, state: DecodeState, rows: slice, logits: Tensor) -> None:
        """Pick the next token of some rows, and send what is new."""
        sequences = [self._running[owner.prompt][owner.completion] for owner in state.owners[rows]]
        append_tokens(state, rows, logits, self._picker(sequences))
        if not bool(state.is_finite):
            raise FloatingPointError(DIVERGED)
        self._take(sequences, logits, state.last_token[rows])

    def _take(self, sequences: Sequence[_Sequence], logits: Tensor, picked: Tensor) -> None:
        """Add the next token to each completion that goes on, and send what is new.

        Args:
            logits: (n, V), from which they were picked.
            picked: (n,) the tokens.
        """
        logprobs = _logprobs(logits, picked, [sequence.request.top_logprobs for sequence in sequences])
        for index, (sequence, token) in enumerate(zip(sequences, picked.tolist())):
            if not sequence.is_done:
                sequence.tokens.append(token)
                sequence.logprobs += [] if logprobs is None else logprobs[index]
                self._send(sequence, is_stopped=token in self._policy.processor.stop_ids)

    def _picker(self, sequences: Sequence[_Sequence]) -> Picker:
        """How the tokens of these rows are picked; settings that rows share cost no more than in a rollout."""
        wanted = [sequence.request.sampling for sequence in sequences]
        sampling: Sampling | None = None
        if len({*wanted}) == 1 and wanted[0] != GREEDY:
            sampling = Sampling(wanted[0][0], 0, wanted[0][1])
        elif len({*wanted}) > 1:
            settings = torch.tensor(wanted, dtype=torch.float64, device=self._policy.device)
            is_cut = any(top_p < 1 for _, top_p in wanted)
            sampling = Sampling(settings[:, :1], 0, settings[:, 1:] if is_cut else 1.0)
        return Picker(sampling, self._suppressed, self._stop)

    def _send(self, sequence: _Sequence, *, is_stopped: bool) -> None:
        """Send the new part of a completion, if there is one to send, and mark it when it ends."""
        request = sequence.request
        is_full = len(sequence.tokens) == request.max_length
        is_last = is_stopped or is_full
        if not (is_last or request.stop or request.is_streamed):
            return
        text = self._policy.processor.decode(sequence.tokens)
        end = min((place for word in request.stop if (place := text.find(word)) >= 0), default=-1)
        if end >= 0:
            text, is_stopped, is_last = text[:end], True, True
        if is_last:
            sequence.is_done = True
            request.send(sequence.piece(text, "stop" if is_stopped else "length"))
        elif request.is_streamed:
            text = text[: _safe_length(text, request.stop)]
            if len(text) > sequence.text_sent:
                request.send(sequence.piece(text, None))

    def _remove(self) -> None:
        """Remove completions that are done, and requests whose last one is."""
        state = self._state
        if state is None:
            return
        is_done = [self._running[owner.prompt][owner.completion].is_done for owner in state.owners]
        if any(is_done):
            state.remove(is_done)
        for number in [n for n, sequences in self._running.items() if all(one.is_done for one in sequences)]:
            del self._running[number]

    def _fail_running(self, message: str, *, is_closed: bool = False) -> None:
        """End all requests in the batch, and forget the batch."""
        self._state = None
        requests = [sequences[0].request for sequences in self._running.values()]
        self._running.clear()
        for request in requests:
            request.send(Failed(message, is_closed))


def _prompt_hash(prompt: EncodedPrompt) -> str:
    """Hash of a prompt's tokens and images."""
    digest = hashlib.blake2b(prompt.input_ids.tobytes(), digest_size=16)
    for name, array in sorted(prompt.image_inputs.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _safe_length(text: str, stop: Sequence[str]) -> int:
    """How much of a text is sure to stay as it is: not an incomplete character at its end, nor what may be the
    beginning of a stop text."""
    whole = text.rstrip(_UNFINISHED)
    starts = [size for word in stop for size in range(1, len(word)) if whole.endswith(word[:size])]
    return len(whole) - max(starts, default=0)


def _logprobs(logits: Tensor, picked: Tensor, wanted: Sequence[int | None]) -> list[list[TokenLogprob]] | None:
    """Log-probabilities of the picked tokens, by row; None if no row wants any.

    Args:
        logits: (n, V).
        picked: (n,).
        wanted: how many of the most likely tokens each row wants, or None.
    """
    counts = [count for count in wanted if count is not None]
    if not counts:
        return None
    logps = logits.float().log_softmax(dim=-1)
    own = logps.gather(1, picked[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in logps.topk(max(max(counts), 1), dim=-1))
    tokens = picked.tolist()
    return [
        [] if count is None else [TokenLogprob(tokens[n], own[n], tuple(zip(ids[n][:count], values[n][:count])))]
        for n, count in enumerate(wanted)
    ]
