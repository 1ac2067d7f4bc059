"""Rendering self-contained pages: the Jinja environment, its filters, and everything that is put inside a page.

A page loads nothing, except from the server of ``medvqa-rl view``. Styles, scripts and images are inside it, all text
is escaped, and a content security policy allows only the one style and the one script inside, by their hashes. Imports
no torch.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from medvqa_rl.config.sharing import without_folders
from medvqa_rl.core.files import without_nan
from medvqa_rl.core.text import format_p, format_points
from medvqa_rl.report.figures.style import number


def render(template: str, **values: Any) -> str:
    """Render a template of ``report/templates`` as HTML."""
    return _environment().get_template(template).render(**values)


def render_with_script(
    template: str, *, styles: Sequence[str], scripts: Sequence[str], data: Any, is_served: bool = False, **values: Any
) -> str:
    """Render a template whose style, script and data are files and values of our own, allowed by a policy.

    Args:
        template: uses ``policy``, ``style``, ``script`` and ``data``, besides ``values``.
        styles: files in ``report/templates``, joined into one style.
        scripts: files in ``report/templates``, joined into one script; it must write text with ``textContent`` only.
        data: JSON for the script.
        is_served: the page may also load images and data from the server that it comes from, and send forms to it.
    """
    folder = files("medvqa_rl.report") / "templates"
    style, code = (
        "\n".join((folder / name).read_text(encoding="utf-8") for name in names) for names in (styles, scripts)
    )
    own, nothing = (" 'self'", "'self'") if is_served else ("", "'none'")
    sources = f"img-src data:{own}; style-src {policy_hash(style)}; script-src {policy_hash(code)}"
    sources += "; connect-src 'self'" if is_served else ""
    return render(
        template,
        policy=f"default-src 'none'; {sources}; base-uri 'none'; form-action {nothing}",
        style=Markup(style),
        script=Markup(code),
        data=Markup(script_json(data)),
        **values,
    )


def script_json(value: Any) -> str:
    """Return JSON for a script element: no character in it can end the element or open a comment. NaN and infinity,
    which a file of a run may hold, become null."""
    text = json.dumps(without_nan(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy_hash(text: str) -> str:
    """Return the source expression that allows one inline script or style in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def data_uri(data: bytes, kind: str) -> str:
    """Return an image file, such as png, as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def thumbnail_uri(image: Image.Image, longest: int, *, lossless_bytes: int = 30_000) -> str:
    """Return an image as a data URI of its :func:`thumbnail`."""
    return data_uri(*thumbnail(image, longest, lossless_bytes=lossless_bytes))


def thumbnail(image: Image.Image, longest: int, *, lossless_bytes: int = 30_000) -> tuple[bytes, str]:
    """Return an image file and its kind, png or jpeg, with the longest side reduced to ``longest`` pixels.

    Small images are stored without loss, so that single pixels stay visible, unless that takes more than
    ``lossless_bytes``.
    """
    buffer = io.BytesIO()
    if max(image.size) <= longest:
        image.save(buffer, "PNG")
        if len(buffer.getvalue()) <= lossless_bytes:
            return buffer.getvalue(), "png"
    buffer, small = io.BytesIO(), image.convert("RGB")
    small.thumbnail((longest, longest))
    small.save(buffer, "JPEG", quality=82)
    return buffer.getvalue(), "jpeg"


# --- environment and filters ----------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("medvqa_rl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "without_folders": without_folders,
        "percent": _percent,
        "points": _points,
        "p_value": _p_value,
        "position": _position,
        "figure": _figure,
        "number": lambda value: f"{value:,}",
    }
    return environment


def _percent(value: float | None, unit: str = "") -> str:
    """A share in percent."""
    text = format_points(number(value))
    return text + unit if text else "–"


def _points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return (format_points(number(value), "+") or "–").replace("-", "−")


def _p_value(value: float) -> str:
    text = format_p(value)
    return text if text.startswith("<") else f"= {text}"


def _position(value: float | None) -> float:
    """A share on a scale from 0 to 100; 0 for NaN."""
    share = number(value)
    return 0.0 if math.isnan(share) else round(100 * share, 2)


def _figure(path: Path) -> str:
    return data_uri(path.read_bytes(), "png")
