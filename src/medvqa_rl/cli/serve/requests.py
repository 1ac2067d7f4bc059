"""Requests of OpenAI's chat API as this server takes them: bounded, checked field by field, and refused in a sentence.

A field that would change the answer and is not supported is refused, and so is a field that nobody knows: what is
answered is what was asked.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic_core
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from medvqa_rl.core.text import printable, shown
from medvqa_rl.data.images.files import decode

MAX_IMAGES = 16
"""Most images of a request."""
MAX_STOP = 16
"""Most stop texts."""
WITHOUT_EFFECT = {
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    *("service_tier", "store", "user"),
}
"""Fields that change no answer."""
NEUTRAL: Mapping[str, Any] = {
    "frequency_penalty": 0,
    "logit_bias": {},
    "modalities": ["text"],
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "tools": [],
}
"""Fields of the API that are not supported, and the values with which they ask for nothing."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)


class ApiError(Exception):
    """A request is refused or fails."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        """
        Args:
            message: a complete sentence.
            status: of HTTP.
            param: the field that it is about.
            code: OpenAI's word for the error.
        """
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Url(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Without effect: images are resized as the model was trained."""


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _Url


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: Any
    name: str = ""


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Body(_Strict):
    model: str
    messages: list[_Message] = Field(min_length=1)
    n: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Any = None
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)


_PART: TypeAdapter[_Text | _Image] = TypeAdapter(Annotated[_Text | _Image, Field(discriminator="type")])


@dataclass(frozen=True)
class Chat:
    """A request for completions of a conversation."""

    model: str
    messages: list[dict[str, Any]]
    """As Hugging Face processors take them."""
    images: list[Image]
    """RGB, in the order of their parts."""
    n: int
    temperature: float
    top_p: float
    max_tokens: int | None
    seed: int | None
    stop: tuple[str, ...]
    is_streamed: bool
    includes_usage: bool
    """A stream ends with the usage."""
    top_logprobs: int | None
    """None reports no log-probabilities."""


def parse_chat(body: bytes) -> Chat:
    """Read the body of a request, and decode its images.

    Raises:
        ApiError: it is not such a request, or asks for something that this server does not do.
    """
    given = _read_object(body)
    try:
        request = _Body.model_validate(given)
    except ValidationError as errors:
        raise _refusal(errors, "") from errors
    if request.top_logprobs and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: set logprobs to true.", param="top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError("max_tokens and max_completion_tokens differ: give one of them.", param="max_tokens")
    images: list[Image] = []
    messages = [
        {"role": message.role, "content": _content(message.content, f"messages[{number}].content", images)}
        for number, message in enumerate(request.messages)
    ]
    return Chat(
        model=request.model,
        messages=messages,
        images=images,
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=next(iter(limits), None),
        seed=request.seed,
        stop=_stop(request.stop),
        is_streamed=request.stream,
        includes_usage=request.stream_options.include_usage,
        top_logprobs=request.top_logprobs if request.logprobs else None,
    )


def _read_object(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object that have a value and an effect."""
    try:
        given = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"The body of the request is not JSON ({printable(str(error))}): send an object.") from error
    if not isinstance(given, dict):
        raise ApiError("The body of the request is not a JSON object: send one with model and messages.")
    fields = {}
    for name, value in given.items():
        if value is None or name in WITHOUT_EFFECT or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name not in _Body.model_fields:
            what = "is not supported by this server" if name in NEUTRAL else "is not a field that this server knows"
            raise ApiError(f"{printable(name)} {what}: leave it out.", param=printable(name))
        fields[name] = value
    return fields


def _refusal(errors: ValidationError, where: str, *, skip: int = 0) -> ApiError:
    """The first problem in a sentence.

    Args:
        where: begins the name of the field.
        skip: first parts of its place to leave out.
    """
    error = errors.errors(include_url=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][skip:])
    name = printable((where + place).removeprefix("."))
    if error["type"] == "missing":
        return ApiError(f"{name} is missing: every request needs it.", param=name)
    if error["type"] == "extra_forbidden":
        return ApiError(f"{name} is not a field that this server knows: leave it out.", param=name)
    what = printable(error["msg"].removeprefix("Input ").removeprefix("Value "))
    return ApiError(f"{name or 'The body'} is {shown(error['input'])}, but {what}.", param=name or None)


def _content(content: Any, where: str, images: list[Image]) -> str | list[dict[str, Any]]:
    """The content of a message as chat templates take it; its images are added to the others."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(f"{where} is {shown(content)}, but should be a text or a list of parts.", param=where)
    parts: list[dict[str, Any]] = []
    for number, given in enumerate(content):
        place = f"{where}[{number}]"
        kind = given.get("type") if isinstance(given, dict) else None
        if kind not in ("text", "image_url"):
            raise ApiError(
                f"{place} is of the type {shown(kind)}, but this model reads parts of the types text and image_url.",
                param=place,
            )
        try:
            part = _PART.validate_python(given)
        except ValidationError as errors:
            raise _refusal(errors, place, skip=1) from errors  # after the kind of the part
        if isinstance(part, _Text):
            parts.append({"type": "text", "text": part.text})
            continue
        if len(images) == MAX_IMAGES:
            raise ApiError(f"The request has more than {MAX_IMAGES} images: ask in several requests.", param=place)
        images.append(_decode(part.image_url.url, place))
        parts.append({"type": "image"})
    return parts


def _decode(url: str, where: str) -> Image:
    """The image of a data URL. No connection is opened for others."""
    found = _DATA_URL.match(url[:200])
    if found is None:
        raise ApiError(
            f"{where} has the URL {shown(url)}, but this server opens no connections and no files: send the image "
            "itself, as data:image/png;base64,...",
            param=where,
        )
    try:
        return decode(base64.b64decode(url[found.end() :], validate=True))
    except binascii.Error as error:
        raise ApiError(f"{where} has an image that is not Base64 ({error}): encode it again.", param=where) from error
    except ValueError as error:
        raise ApiError(f"{where} has an image that {error}: convert it to PNG.", param=where) from error


def _stop(given: Any) -> tuple[str, ...]:
    stop = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stop, list) or len(stop) > MAX_STOP or not all(isinstance(word, str) and word for word in stop):
        raise ApiError(
            f"stop is {shown(given)}, but should be a text that is not empty, or up to {MAX_STOP} of them.",
            param="stop",
        )
    return tuple(stop)
