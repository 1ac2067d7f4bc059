"""Replies in the shape of OpenAI's chat API: whole ones, streamed ones, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medvqa_rl.cli.serve.requests import ApiError
from medvqa_rl.rollout.online import Piece, TokenLogprob

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


@dataclass
class Reply:
    """The reply to a request, from its pieces."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    prompt_tokens: int
    token_text: Callable[[int], str]
    has_logprobs: bool
    completion_tokens: int = 0

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A chat completion.

        Args:
            pieces: of all completions, those of each in order.
        """
        choices = []
        for index in range(1 + max(piece.completion for piece in pieces)):
            own = [piece for piece in pieces if piece.completion == index]
            self.completion_tokens += sum(piece.num_tokens for piece in own)
            text = "".join(piece.text for piece in own)
            message = {"role": "assistant", "content": text, "refusal": None}
            logprobs = self._logprobs([one for piece in own for one in piece.logprobs])
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": own[-1].finish})
        return self._head("chat.completion") | {"choices": choices, "usage": self.usage()}

    def first(self, count: int, *, has_usage: bool) -> list[dict[str, Any]]:
        """The chunks that begin a stream of ``count`` completions."""
        return [
            self._chunk(index, {"role": "assistant", "content": ""}, has_usage=has_usage) for index in range(count)
        ]

    def chunk(self, piece: Piece, *, has_usage: bool) -> dict[str, Any]:
        """The chunk of a piece."""
        self.completion_tokens += piece.num_tokens
        return self._chunk(
            piece.completion,
            {"content": piece.text},
            logprobs=self._logprobs(piece.logprobs),
            finish=piece.finish,
            has_usage=has_usage,
        )

    def last(self) -> dict[str, Any]:
        """The chunk with the usage, which ends a stream that asked for it."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """The tokens of the prompt, images included, and of all completions with the tokens that end them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        has_usage: bool,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        head = self._head("chat.completion.chunk") | {"choices": [choice]}
        return head | {"usage": None} if has_usage else head

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        content = [
            self._token(one.token, one.logp) | {"top_logprobs": [self._token(*other) for other in one.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logp: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logp, "bytes": [*text.encode("utf-8", "replace")]}


def as_event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


END = "data: [DONE]\n\n"
"""Ends a stream."""
