"""Bodies of requests: read, or refused in a sentence that names the field."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medvqa_rl.cli.serve.replies import error_body
from medvqa_rl.cli.serve.requests import MAX_IMAGES, NEUTRAL, WITHOUT_EFFECT, ApiError, parse_chat


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


PIXELS = Image.effect_noise((9, 7), 90).convert("RGB")
PNG = encoded(PIXELS)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "Where?"}]} | fields).encode()


def user(content: Any) -> bytes:
    return body(messages=[{"role": "user", "content": content}])


def image_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_defaults_are_those_of_the_api() -> None:
    chat = parse_chat(body())
    assert (chat.n, chat.temperature, chat.top_p, chat.max_tokens, chat.seed, chat.stop) == (
        1,
        1.0,
        1.0,
        None,
        None,
        (),
    )
    assert not chat.is_streamed and not chat.includes_usage and chat.top_logprobs is None
    assert chat.messages == [{"role": "user", "content": "Where?"}] and chat.images == []


def test_everything_that_is_given_is_read() -> None:
    settings: dict[str, Any] = {"n": 2, "temperature": 0, "top_p": 0.5, "max_completion_tokens": 7, "seed": 3}
    settings |= {"stop": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    chat = parse_chat(body(**settings, top_logprobs=4, max_tokens=7, name=None))
    assert (chat.n, chat.temperature, chat.top_p, chat.max_tokens, chat.seed) == (2, 0.0, 0.5, 7, 3)
    assert chat.stop == ("a", "b") and chat.is_streamed and chat.includes_usage and chat.top_logprobs == 4
    assert parse_chat(body(stop="x", logprobs=True)).stop == ("x",)
    assert parse_chat(body(logprobs=True)).top_logprobs == 0


def test_fields_without_effect_may_be_given() -> None:
    assert parse_chat(body(**dict.fromkeys(WITHOUT_EFFECT, "x"), **NEUTRAL)) == parse_chat(body())


def test_images_keep_their_pixels_and_their_places() -> None:
    second = PIXELS.rotate(90, expand=True)
    kinds = {"image/png": PNG, "image/PNG;name=x.png": encoded(second), "image/bmp": encoded(PIXELS, "BMP")}
    urls = [f"data:{kind};base64,{data}" for kind, data in kinds.items()]
    parts = [image_part(urls[0]), {"type": "text", "text": "and"}, image_part(urls[1])]
    chat = parse_chat(
        body(
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "Yes.", "name": "x"},
                {"role": "user", "content": [image_part(urls[2])]},
            ]
        )
    )
    assert [message["content"] for message in chat.messages] == [
        "Be brief.",
        [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}],
        "Yes.",
        [{"type": "image"}],
    ]
    assert [image.tobytes() for image in chat.images] == [PIXELS.tobytes(), second.tobytes(), PIXELS.tobytes()]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"The body of the request is not JSON \(.*\): send an object\."),
        (b'{"model": NaN}', r"is not JSON"),
        (b'{"model": "\\ud800"}', r"is not JSON"),
        (b"[" * 100_000, r"is not JSON"),
        (b"[]", r"is not a JSON object: send one with model and messages\."),
        (b"{}", r"^model is missing: every request needs it\.$"),
        (body(messages=[]), r"messages is \[\], but .*at least 1 item.*\.$"),
        (body(messages=[{"role": "tool", "content": "x"}]), r"messages\[0\]\.role is 'tool', but should be 'system'"),
        (body(messages=[{"role": "user"}]), r"messages\[0\]\.content is missing"),
        (body(messages=[{"role": "user", "content": "x", "tool_calls": []}]), r"messages\[0\]\.tool_calls is not a"),
        (body(n=0), r"^n is 0, but should be greater than or equal to 1\.$"),
        (body(n=True), r"^n is True, but should be a valid integer\.$"),
        (body(n="2"), r"^n is '2', but should be a valid integer\.$"),
        (body(temperature=2.1), r"^temperature is 2\.1, but should be less than or equal to 2\.$"),
        (body(top_p=0), r"^top_p is 0, but should be greater than 0\.$"),
        (body(seed=2**70), r"^seed is "),
        (body(stop=[""]), r"^stop is \[''\], but should be a text that is not empty"),
        (body(stop=["x"] * 17), r"^stop is "),
        (body(stop=3), r"^stop is 3"),
        (body(max_tokens=3, max_completion_tokens=4), r"^max_tokens and max_completion_tokens differ: give one"),
        (body(top_logprobs=2), r"^top_logprobs needs logprobs: set logprobs to true\.$"),
        (body(top_logprobs=21, logprobs=True), r"^top_logprobs is 21"),
        (body(stream_options={"x": 1}), r"^stream_options\.x is not a field that this server knows: leave it out\.$"),
        (body(frequency_penalty=0.5), r"^frequency_penalty is not supported by this server: leave it out\.$"),
        (body(response_format={"type": "json_object"}), r"^response_format is not supported"),
        (body(top_k=3), r"^top_k is not a field that this server knows: leave it out\.$"),
        (user(3), r"^messages\[0\]\.content is 3, but should be a text or a list of parts\.$"),
        (user([]), r"^messages\[0\]\.content is \[\]"),
        (user(["x"]), r"^messages\[0\]\.content\[0\] is of the type None, but this model reads"),
        (user([{"type": "input_audio"}]), r"is of the type 'input_audio'"),
        (
            user([{"type": "text", "text": 3}]),
            r"^messages\[0\]\.content\[0\]\.text is 3, but should be a valid string",
        ),
        (user([{"type": "image_url"}]), r"^messages\[0\]\.content\[0\]\.image_url is missing"),
        (user([image_part("http://example.com/a.png")]), r"but this server opens no connections and no files: send"),
        (user([image_part("file:///etc/passwd")]), r"but this server opens no connections and no files"),
        (user([image_part("data:text/html;base64,AAAA")]), r"opens no connections"),
        (user([image_part("data:image/png;base64,A*A=")]), r"has an image that is not Base64"),
        (user([image_part("data:image/png;base64,AAAA")]), r"has an image that cannot be decoded as one of PNG, JPEG"),
        (user([image_part(f"data:image/png;base64,{PNG[:80]}")]), r"has an image that cannot be decoded"),
        (user([image_part(f"data:image/png;base64,{PNG}")] * (MAX_IMAGES + 1)), r"more than 16 images"),
    ],
)
def test_other_bodies_are_refused_in_a_sentence(data: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(data)
    text = str(caught.value)
    assert re.search(message, text), text
    assert caught.value.status == 400 and text.endswith((".", "...")) and "\n" not in text and len(text) < 400
    json.dumps(error_body(caught.value))


def test_a_large_image_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("1", (9_000, 9_000)))
    with pytest.raises(ApiError, match=r"has 9000 x 9000 pixels, but at most 80,000,000 are decoded: convert"):
        parse_chat(user([image_part(f"data:image/png;base64,{data}")]))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(
    st.sampled_from(["model", "messages", "n", "stop", "seed", "stream", "stream_options", "logprobs", "tools", "x"]),
    VALUES,
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"])}, optional={"text": VALUES, "image_url": VALUES}
)


@given(FIELDS, st.lists(PARTS | VALUES, max_size=3), st.booleans())
def test_no_body_ends_in_another_error(fields: dict[str, Any], parts: list[Any], is_sound: bool) -> None:
    base = {"model": "m", "messages": [{"role": "user", "content": parts}]} if is_sound else {}
    try:
        parse_chat(json.dumps(base | fields).encode())
    except ApiError as error:
        assert str(error) and json.dumps(error_body(error))


@given(st.binary(max_size=60))
def test_no_bytes_end_in_another_error(data: bytes) -> None:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    for sent in (data, user([image_part(url)])):
        with pytest.raises(ApiError):
            parse_chat(sent)
