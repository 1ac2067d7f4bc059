"""Files of downloaded checkpoints, which are not trusted: what reading them raises, and limits for chat templates."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

FILE_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TemplateError,
    TypeError,
    ValueError,
)
"""What transformers and PEFT raise for damaged files. Catch them around their calls only."""
SLACK = 10_000_000
"""Weights that a model may have beyond twice those of its files: few enough to allocate before they are compared."""
SECONDS = 5
"""Processor time that a chat template may take for one question; real ones take a millisecond."""
_MEMORY = 2**30
_MAX_CHARACTERS = 1_000_000
_PROGRAM = """
import json, resource, sys
given = json.load(sys.stdin)
for limit, value in ((resource.RLIMIT_CPU, given["seconds"]), (resource.RLIMIT_AS, given["memory"])):
    try:
        resource.setrlimit(limit, (value, value))
    except (OSError, ValueError):
        pass  # not every system has both limits
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
def refuse(message):
    raise TemplateError(message)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: "")
try:
    text = environment.from_string(given["template"]).render(messages=given["messages"], add_generation_prompt=True)
except (MemoryError, OverflowError):
    sys.exit(3)
except Exception:
    sys.exit(0)  # an error: the processor reports it when it renders the template itself
sys.exit(3 if len(text) > given["characters"] else 0)
"""


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint; opens no connection.

    Raises:
        ValueError: a file is missing or damaged, or its chat template takes too long.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the package tokenizers raises nothing more specific
        raise ValueError(str(error)) from error
    check_effort(tokenizer)
    return tokenizer


MAX_PIXELS = 100_000_000
"""No checkpoint resizes images to more than this."""


def check_image_size(size: Any) -> None:
    """Refuse settings that would resize every image to one that fills the memory.

    Args:
        size: of an image processor: ``shortest_edge`` (of a side, or the pixels in all), or ``height`` and ``width``.

    Raises:
        ValueError: they would.
    """
    get = getattr(size, "get", None)
    if get is None:
        return
    least = max(get("shortest_edge") or 0, (get("height") or 0) * (get("width") or 0))
    if least > MAX_PIXELS:
        raise ValueError(f"images of at least {least:,} pixels, but {MAX_PIXELS:,} are the most that is sensible")


def check_size(folder: Path, loader: Any) -> None:
    """Refuse a configuration of a far larger model than the files hold: without its sizes, transformers takes those of
    the family's largest model, and allocates them before any weight is compared.

    Args:
        loader: the class that will load it, such as ``AutoModelForCausalLM``.

    Raises:
        ValueError: the model would have more than twice the weights of the files.
        FILE_ERRORS: a file is damaged.
    """
    held = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    if not held:
        return
    settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = loader.from_config(settings)
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * held + SLACK:
        raise ValueError(
            f"config.json describes a model of {described:,} weights, but the files hold {held:,}; take both from "
            "the same checkpoint"
        )


def check_effort(tokenizer: Any) -> None:
    """Render a tokenizer's chat template once in a process with little time and memory. A template is a program: this
    one comes with the checkpoint, and its loops may have no end.

    Raises:
        ValueError: it takes too long, or writes too much.
    """
    if tokenizer.chat_template is not None:
        _render_within_limits(tokenizer.get_chat_template())


@cache
def _render_within_limits(template: str) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "Is there a mass?"}]
    given = {
        "template": re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template),  # a tag that transformers adds
        "messages": [{"role": "user", "content": content}],
        "seconds": SECONDS,
        "memory": _MEMORY,
        "characters": _MAX_CHARACTERS,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        is_cheap = done.returncode == 0
    except subprocess.TimeoutExpired:
        is_cheap = False
    if not is_cheap:
        raise ValueError(
            f"The chat template needs more than {SECONDS} seconds, 1 GiB or {_MAX_CHARACTERS:,} characters for one "
            "question: use the chat template that came with the checkpoint."
        )
