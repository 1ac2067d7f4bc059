"""The HTTP server: OpenAI's routes in front of an :class:`OnlineEngine`, which decodes in a thread of its own."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from medvqa_rl.cli.serve.replies import END, Reply, as_event, error_body
from medvqa_rl.cli.serve.requests import ApiError, Chat, parse_chat
from medvqa_rl.core.network import is_loopback
from medvqa_rl.core.text import printable
from medvqa_rl.core.types import EncodedPrompt
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.online import Failed, OnlineEngine, Piece, Request
from medvqa_rl.rollout.stock.online import make_online_engine

if TYPE_CHECKING:
    import socket

MAX_BODY = 64 * 2**20
"""Most bytes of a request."""
BODY_SECONDS = 60.0
"""Longest time for a request to arrive."""
MAX_BODIES = 4
"""Requests that are read and decoded at a time; the others wait."""
MAX_PENDING = 256
"""Requests that are read, wait or run at a time; more are refused."""
GONE = 499
"""Status for a client that is no longer there, which nobody sees."""


class ModelServer:
    """Serves one model."""

    def __init__(
        self, policy: Policy, name: str, *, max_batch: int, max_length: int, key: str | None, is_local: bool
    ) -> None:
        """
        Args:
            policy: the model.
            name: of the model in requests.
            max_batch: most completions that are decoded at a time.
            max_length: most tokens of a completion.
            key: that requests must show; None needs none.
            is_local: the server listens to this machine only, so requests must name it: a page that a browser shows
                may lead a name of its own to this machine.
        """
        self.engine = make_online_engine(policy, max_sequences=max_batch, max_length=max_length)
        self._policy, self._name, self._is_local = policy, name, is_local
        self._key = None if key is None else key.encode()
        self._started = int(time.time())
        self._pending = 0
        self._bodies = asyncio.Semaphore(MAX_BODIES)
        text: Any = causal_model(policy.model).config.get_text_config()
        self._context: int = getattr(text, "max_position_embeddings", 2**31)
        """Most tokens of a prompt and its answer."""
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse_route, ClientDisconnect: _forget},
        )
        config = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        self._http = _Server(config, self.engine)

    def run(self, listener: socket.socket) -> None:
        """Serve until a signal, or :meth:`stop`, ends it; what runs then fails at once."""
        worker = Thread(target=self.engine.run, name="engine", daemon=True)
        worker.start()
        try:
            self._http.run(sockets=[listener])
        finally:
            self.engine.close()
            worker.join(10)

    def stop(self) -> None:
        """End :meth:`run`, from any thread."""
        self.engine.close()
        self._http.should_exit = True

    async def _health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: HttpRequest) -> Response:
        self._check(request)
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: HttpRequest) -> Response:
        self._check(request)
        self._check_name(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._started, "owned_by": "medvqa-rl"}

    async def _chat(self, request: HttpRequest) -> Response:
        """Answer a request for completions."""
        self._check(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which a browser sends to another site only with its permission
            raise ApiError(f"The content type is {printable(kind)!r}: send application/json.", status=415)
        if self._pending >= MAX_PENDING:
            raise ApiError(f"The server has {MAX_PENDING} requests already: try again later.", status=429)
        self._pending += 1
        try:
            async with self._bodies:
                chat, prompt = await run_in_threadpool(self._prepare, await _read_body(request))
            answer = _Answer(self._request(chat, prompt), self.engine)
            reply = Reply(
                id=f"chatcmpl-{secrets.token_hex(12)}",
                created=int(time.time()),
                model=self._name,
                prompt_tokens=len(prompt.input_ids),
                token_text=lambda token: str(self._policy.processor.tokenizer.decode([token])),
                has_logprobs=chat.top_logprobs is not None,
            )
            if not chat.is_streamed:
                pieces = await answer.all_pieces(request)
                return Response(status_code=GONE) if pieces is None else JSONResponse(reply.whole(pieces))
            first = await answer.next()  # which may be an error
            self._pending += 1
        finally:
            self._pending -= 1

        def end() -> None:
            answer.cancel()
            self._pending -= 1

        return _Stream(_events(answer, first, reply, chat), end)

    def _check(self, request: HttpRequest) -> None:
        """Refuse a request without the key, or for another host than this machine."""
        host = request.headers.get("host", "")
        if self._is_local and not _is_this_machine(host):
            raise ApiError(
                f"The host {printable(host)!r} is not this machine: start the server with --host to serve others.",
                status=403,
            )
        if self._key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
                raise ApiError(
                    "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                    status=401,
                    code="invalid_api_key",
                )

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                f"The model {printable(name)!r} is not served here: ask for {self._name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _prepare(self, body: bytes) -> tuple[Chat, EncodedPrompt]:
        """Read a request, and encode its conversation."""
        chat = parse_chat(body)
        self._check_name(chat.model)
        if chat.n > self.engine.max_sequences:
            raise ApiError(
                f"n is {chat.n}, but this server decodes at most {self.engine.max_sequences} completions at a time: "
                "ask for fewer, or start it with a larger --max-batch.",
                param="n",
            )
        if (chat.max_tokens or 0) > self.engine.max_length:
            raise ApiError(
                f"max_tokens is {chat.max_tokens}, but this server writes at most {self.engine.max_length}: ask for "
                "fewer, or start it with a larger --max-length.",
                param="max_tokens",
            )
        try:
            return chat, self._policy.processor.encode_chat(chat.messages, chat.images)
        except ValueError as error:
            message = str(error).removesuffix(".")
            raise ApiError(f"{message[:1].upper()}{message[1:]}.", param="messages") from error

    def _request(self, chat: Chat, prompt: EncodedPrompt) -> Request:
        room = self._context - len(prompt.input_ids)
        if room < (chat.max_tokens or 1):
            raise ApiError(
                f"The prompt has {len(prompt.input_ids)} tokens, and with {chat.max_tokens or 1} for the answer it is "
                f"longer than the {self._context} that this model reads: shorten it, or send smaller images.",
                param="messages",
                code="context_length_exceeded",
            )
        return Request(
            prompt,
            send=lambda piece: None,
            max_length=chat.max_tokens or min(self.engine.max_length, room),
            temperature=chat.temperature,
            top_p=chat.top_p,
            seed=secrets.randbits(63) if chat.seed is None else chat.seed,
            num_generations=chat.n,
            stop=chat.stop,
            top_logprobs=chat.top_logprobs,
            is_streamed=chat.is_streamed,
        )


class _Answer:
    """What the engine sends for a request, in the server's event loop."""

    def __init__(self, request: Request, engine: OnlineEngine) -> None:
        self._request, self._left = request, request.num_generations
        self._events: asyncio.Queue[Piece | Failed] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(event: Piece | Failed) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        request.send = send
        engine.submit(request)

    @property
    def is_complete(self) -> bool:
        """Whether every completion has ended."""
        return self._left == 0

    def cancel(self) -> None:
        """Take the request out of the batch, if it is still there."""
        self._request.is_cancelled = True

    async def next(self) -> Piece:
        """The next piece.

        Raises:
            ApiError: the request failed.
        """
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(event, Failed):
            raise ApiError(event.message, status=503 if event.is_closed else 500)
        self._left -= event.finish is not None
        return event

    async def all_pieces(self, request: HttpRequest) -> list[Piece] | None:
        """All pieces; None if the client leaves before the last one."""
        collected = asyncio.ensure_future(self._collect())
        left = asyncio.ensure_future(_leaves(request))
        try:
            await asyncio.wait({collected, left}, return_when=asyncio.FIRST_COMPLETED)
            return collected.result() if collected.done() else None
        finally:
            collected.cancel()
            left.cancel()
            self.cancel()

    async def _collect(self) -> list[Piece]:
        pieces = []
        while not self.is_complete:
            pieces.append(await self.next())
        return pieces


class _Stream(StreamingResponse):
    """A streamed reply."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        """
        Args:
            events: of the reply.
            end: called when the last one is sent, or the client leaves.
        """
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


async def _events(answer: _Answer, piece: Piece, reply: Reply, chat: Chat) -> AsyncIterator[str]:
    """The events of a streamed reply, which begins with a piece."""
    has_usage = chat.includes_usage
    try:
        for chunk in reply.first(chat.n, has_usage=has_usage):
            yield as_event(chunk)
        yield as_event(reply.chunk(piece, has_usage=has_usage))
        while not answer.is_complete:
            yield as_event(reply.chunk(await answer.next(), has_usage=has_usage))
    except ApiError as error:
        yield as_event(error_body(error))
        return
    if has_usage:
        yield as_event(reply.last())
    yield END


class _Server(uvicorn.Server):
    """Ends the engine with the first signal, so that nothing is waited for."""

    def __init__(self, config: uvicorn.Config, engine: OnlineEngine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.close()
        super().handle_exit(sig, frame)


def _is_this_machine(host: str) -> bool:
    """Whether the host that a request names, perhaps with a port, is this machine."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


async def _read_body(request: HttpRequest) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is too long, or takes too long.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise ApiError(
                        f"The request is longer than {MAX_BODY // 2**20} MiB: send fewer or smaller images.",
                        status=413,
                    )
    except TimeoutError as error:
        raise ApiError(f"The request took longer than {BODY_SECONDS:g} seconds to arrive.", status=408) from error
    return bytes(body)


async def _leaves(request: HttpRequest) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error_body(error), status_code=error.status)


async def _refuse_route(request: HttpRequest, error: Exception) -> Response:
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    here = "this server has POST /v1/chat/completions, GET /v1/models and GET /health"
    what = f"{printable(request.method)} {printable(request.url.path)} does not exist: {here}."
    return await _refuse(request, ApiError(what, status=error.status_code))


async def _forget(request: HttpRequest, error: Exception) -> Response:
    """The client left while it was sending."""
    return Response(status_code=GONE)
