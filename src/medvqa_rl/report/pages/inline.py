"""Putting things inside a page that loads nothing: images as data URIs, JSON for its script, hashes for its policy.

Imports no torch.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from typing import Any

from PIL import Image


def data_uri(data: bytes, kind: str) -> str:
    """An image file of a kind such as png as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def thumbnail_uri(image: Image.Image, longest: int, *, lossless_bytes: int = 30_000) -> str:
    """An image as a data URI, its longest side reduced to so many pixels.

    Small images are kept without loss, so that single pixels stay visible, unless that takes more than
    ``lossless_bytes``.
    """
    buffer = io.BytesIO()
    if max(image.size) <= longest:
        image.save(buffer, "PNG")
        if len(buffer.getvalue()) <= lossless_bytes:
            return data_uri(buffer.getvalue(), "png")
    buffer, small = io.BytesIO(), image.convert("RGB")
    small.thumbnail((longest, longest))
    small.save(buffer, "JPEG", quality=82)
    return data_uri(buffer.getvalue(), "jpeg")


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character in it can end the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy_hash(text: str) -> str:
    """The source expression by which a content security policy allows one inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
