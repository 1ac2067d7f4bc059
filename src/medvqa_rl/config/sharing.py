"""What may be shown of settings outside this machine: on cards, pages and trackers. Imports no torch.

Numbers, booleans and named choices are shown. Free text is shown as declared here, and hidden if it is not declared,
so that a new setting shows nothing until somebody decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from medvqa_rl.config import is_hub_id, leaves
from medvqa_rl.config.inputs import ColumnsConfig
from medvqa_rl.config.schema import Schema, locate, resolve

PLAIN = {"model.revision", "model.lora.targets", "data.revision", "data.families", "data.modalities"}
PLAIN |= {"judge.revision", "judge.device", "prompt.system", "prompt.instruction"}
"""Shown as it is: text that names nothing of the user's, and prompts, without which no result can be repeated."""
FOLDERS = {"output_dir", "model.adapter", "data.path", "data.image_folder", "data.cache_dir", "vllm.weights_dir"}
FOLDERS |= {"judge.cache_dir", "data.pass_rate_from"}
"""Shown by their last part."""
MODELS = {"model.path", "data.hub", "rewards.similarity_model", "judge.model", "eval.perplexity_model"}
MODELS |= {"eval.similarity", "model.average_with"}
"""Hub ids and names are shown, folders by their last part."""
ADDRESSES = {"vllm.server_url", "judge.endpoint"}
"""Shown by host and port, without user, password, path and query."""
HIDDEN_SETTINGS = {"judge.api_key_env", "data.skip_images"}
HIDDEN_SETTINGS |= {f"data.columns.{name}" for name in ColumnsConfig.model_fields}
"""Never shown; file names can be names of patients."""

HIDDEN = "(hidden)"
_FOLDER = re.compile(r"""(?<![\w:/.~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'"`<>|]+[/\\])+(?=[^\s/\\'"`<>|])""")


def shareable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted path as they may be shown elsewhere.

    Args:
        settings: nested, as ``Config.model_dump(mode="json")`` or as stored by a run, also of another version.
    """
    return {path: _shareable(path, value) for path, value in leaves(settings).items()}


def _shareable(path: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float) or value in ([], {}):
        return value
    name = path.replace("eval_judge.", "judge.", 1) if path.startswith("eval_judge.") else path
    schema, rest = locate(name.split("."))
    if (not rest and _is_named(resolve(schema), value)) or name in PLAIN:
        return value
    if not isinstance(value, str):
        return HIDDEN
    if name in FOLDERS or name in MODELS:
        keeps = name in MODELS and (is_hub_id(value) or re.fullmatch(r"[\w.:-]+", value))
        return value if keeps else last_part(value)
    if name in ADDRESSES:
        return urlsplit(value).netloc.rpartition("@")[2] or HIDDEN
    return HIDDEN


def _is_named(schema: Schema, value: Any) -> bool:
    """Whether a value is one of the choices that a setting names, or a list of choices or numbers."""
    if isinstance(value, list):
        items = schema.get("items", {})
        return all(isinstance(entry, int | float) or _is_named(resolve(items), entry) for entry in value)
    return value in schema.get("enum", [schema["const"]] if "const" in schema else [])


def last_part(path: str) -> str:
    """The last part of a path or address, without query and fragment."""
    return re.split(r"[/\\]", re.split(r"[?#]", path)[0].rstrip("/\\"))[-1] or HIDDEN


def without_folders(text: str) -> str:
    """Reduce the full paths in a message to their last parts."""
    return _FOLDER.sub("", text)
