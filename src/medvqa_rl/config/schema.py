"""The schema of the settings: dotted paths, allowed values in words, and the reference tables. Imports no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from medvqa_rl.config import Config
from medvqa_rl.config.base import OnResume
from medvqa_rl.core.text import printable

SCHEMA: dict[str, Any] = Config.model_json_schema()
Schema = Mapping[str, Any]


def resolve(schema: Schema) -> Schema:
    """Follow references and drop the null option of an optional field."""
    if "$ref" in schema:
        return resolve(SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")])
    if "anyOf" in schema:
        (inner,) = (option for option in schema["anyOf"] if option.get("type") != "null")
        return resolve(inner)
    return schema


def is_nullable(schema: Schema) -> bool:
    """Whether null is allowed."""
    return any(option.get("type") == "null" for option in schema.get("anyOf", ()))


def allowed(schema: Schema) -> str:
    """Describe what a field allows: "a number above 0 and at most 1"."""
    inner = resolve(schema)
    text = _allowed(inner)
    return f"{text}, or null" if is_nullable(schema) else text


def _allowed(schema: Schema) -> str:
    if "enum" in schema or "const" in schema:
        return one_of(schema.get("enum", [schema.get("const")]))
    match schema["type"]:
        case "integer":
            return "a whole number" + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "boolean":
            return "true or false"
        case "string":
            return "text that is not empty" if schema.get("minLength") else "text"
        case "array" if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])}, each {allowed(schema['prefixItems'][0])}"
        case "array":
            return f"a list, each entry {allowed(schema['items'])}"
        case "object" if "properties" in schema:
            return f"a section ({', '.join(schema['properties'])})"
        case other:
            assert other == "object", schema
            return f"a section of names, each with {allowed(schema['additionalProperties'])}"


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    parts = [
        f"{word} {bound:g}"
        for word, bound in (("above", above), ("of at least", low), ("below", below), ("at most", high))
        if bound is not None
    ]
    return " " + " and ".join(parts) if parts else ""


def one_of(names: Sequence[Any]) -> str:
    """ "a", "a or b", "a, b or c"."""
    words = [str(name) for name in names]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def show(value: Any) -> str:
    """Show a given value as the user wrote it, cut to 80 characters."""
    text = f"the text '{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return printable(text, 77) if len(text) > 80 else printable(text, 80)


def did_you_mean(word: Any, names: Iterable[Any]) -> str:
    """ ": did you mean X?" or nothing."""
    close = difflib.get_close_matches(str(word).lower(), [str(name) for name in names], n=1)
    return f": did you mean {close[0]}?" if close else ""


def locate(path: Sequence[str | int]) -> tuple[Schema, tuple[str | int, ...]]:
    """Follow a path into the schema as far as it exists.

    Returns:
        The schema of the last setting found, and the rest of the path.
    """
    schema: Schema = SCHEMA
    for depth, step in enumerate(path):
        inner = resolve(schema)
        if isinstance(step, int) and inner.get("type") == "array":
            schema = inner["items"] if "items" in inner else inner["prefixItems"][step]
        elif step in inner.get("properties", {}):
            schema = inner["properties"][step]
        elif isinstance(inner.get("additionalProperties"), Mapping):
            schema = inner["additionalProperties"]
        else:
            return schema, tuple(path[depth:])
    return schema, ()


def all_settings(schema: Schema = SCHEMA, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Yield the dotted path and schema of every setting, sections before their fields."""
    for name, field in schema["properties"].items():
        yield prefix + name, field
        inner = resolve(field)
        if "properties" in inner:
            yield from all_settings(inner, f"{prefix}{name}.")


_SETTINGS = dict(all_settings())


def on_resume(path: str) -> OnResume:
    """Return what changing a setting, given by its dotted path, does to a resumed run."""
    steps = path.split(".")
    # From the inside out: a name in rewards.functions has dots of its own.
    prefixes = (".".join(steps[:depth]) for depth in range(len(steps), 0, -1))
    kind: OnResume = next(_SETTINGS[prefix]["on_resume"] for prefix in prefixes if prefix in _SETTINGS)
    return kind


def reference_tables() -> str:
    """Return Markdown tables of every setting: default, allowed values, effect on a resumed run, description. docs/
    has a copy."""
    lines: list[str] = []
    sections = [("", SCHEMA)] + [(name, resolve(field)) for name, field in all_settings()]
    for name, section in sections:
        fields = section.get("properties", {})
        rows = [(key, field) for key, field in fields.items() if not (name == "" and "$ref" in field)]
        if not rows:
            continue
        lines += [f"### {name or 'top level'}", ""]
        lines += [section["description"].replace("``", "`"), ""]
        lines += ["| setting | default | allowed | on resume | what it does |", "|---|---|---|---|---|"]
        for key, field in rows:
            path = f"{name}.{key}".removeprefix(".")
            what = field.get("description", "See below.").replace("``", "`").replace("None ", "null ")
            default = json.dumps(field["default"], ensure_ascii=False) if "default" in field else "{}"
            lines.append(f"| `{path}` | `{default}` | {allowed(field)} | {field.get('on_resume', '')} | {what} |")
        lines.append("")
    return "\n".join(lines)


def dotted(path: Sequence[str | int]) -> str:
    """``("data", "answer_types", 0)`` as ``data.answer_types[0]``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
