"""Read settings: a YAML file and ``key=value`` overrides become a :class:`~medvqa_rl.config.Config`.

All problems are reported at once, one sentence each. Imports no torch.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.tokens import (
    AliasToken,
    BlockEndToken,
    BlockMappingStartToken,
    BlockSequenceStartToken,
    FlowMappingEndToken,
    FlowMappingStartToken,
    FlowSequenceEndToken,
    FlowSequenceStartToken,
)

from medvqa_rl.config import Config, ConfigError, Purpose, leaves
from medvqa_rl.config.problems.checks import Problem, cross_checks, field_problem
from medvqa_rl.config.schema import is_nullable, locate, resolve, show
from medvqa_rl.core.text import printable, shown

_TAGS = ("null", "bool", "float", "str", "seq", "map")
MAX_DIGITS = 30
"""Most characters of a whole number, separators included."""
MAX_DEPTH = 50
"""Most lists and sections inside each other. The parser's time grows with the square of the depth."""
_STARTS = (BlockMappingStartToken, BlockSequenceStartToken, FlowMappingStartToken, FlowSequenceStartToken)
_ENDS = (BlockEndToken, FlowMappingEndToken, FlowSequenceEndToken)


def _unusable(text: str) -> str:
    """What in a text neither a file's name nor a prompt can hold; empty if there is nothing."""
    if "\0" in text:
        return "a text holds the character NUL"
    return "" if text.isascii() or text == text.encode(errors="replace").decode() else "a text is not valid Unicode"


class _Constructor(SafeConstructor):
    """Builds mappings with text keys, lists and plain scalars; any other tag is an error. Dates stay text."""

    yaml_constructors = {
        **{f"tag:yaml.org,2002:{tag}": SafeConstructor.yaml_constructors[f"tag:yaml.org,2002:{tag}"] for tag in _TAGS},
        "tag:yaml.org,2002:int": lambda self, node: self.construct_yaml_int(node),
        "tag:yaml.org,2002:timestamp": SafeConstructor.construct_yaml_str,
        "tag:yaml.org,2002:value": SafeConstructor.construct_yaml_str,  # a lone =
        None: SafeConstructor.construct_undefined,
    }

    def construct_scalar(self, node: ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and (problem := _unusable(value)):
            raise ConstructorError(None, None, problem, node.start_mark)
        return value

    def construct_yaml_int(self, node: ScalarNode) -> Any:
        if len(node.value) > MAX_DIGITS:
            raise ConstructorError(None, None, f"a number has more than {MAX_DIGITS} digits", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> Any:
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise ConstructorError(None, None, "a key must be a word", key.start_mark)
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        # ruamel.yaml reads its own plain [?a] as a mapping, and a quoted next-line character as a space.
        style = '"' if data[:1] in ("?", ":") or not data.isprintable() else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def _parser() -> YAML:
    """YAML 1.2, in which ``1e-6`` is a number and ``no`` is text. A parser keeps state, so each call makes its own."""
    made = YAML(typ="safe", pure=True)
    made.Constructor, made.Representer = _Constructor, _Representer
    made.width = 10**9
    made.allow_unicode = True
    made.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return made


def read_yaml(text: str) -> Any:
    """Return the plain data in YAML text.

    Raises:
        YAMLError: the text is not YAML, is nested too deeply, or has duplicate keys, aliases, unknown tags, long
            numbers or text that is not valid Unicode.
    """
    depth = 0
    for token in _parser().scan(text):
        depth += isinstance(token, _STARTS) - isinstance(token, _ENDS)
        if depth > MAX_DEPTH:
            raise YAMLError("its lists and sections are nested too deeply")
        if isinstance(token, AliasToken):
            raise ConstructorError(None, None, "aliases (*name) are not supported", token.start_mark)
    return _parser().load(text)


def write_yaml(data: Any, *, inline: bool = False) -> str:
    """Return YAML text that :func:`read_yaml` reads back unchanged, on one line if ``inline``."""
    dumper = _parser()
    dumper.default_flow_style = inline
    out = io.StringIO()
    dumper.dump(data, out)
    return out.getvalue().removesuffix("\n").removesuffix("\n...") + ("" if inline else "\n")


def _sentence(error: YAMLError) -> str:
    """Describe a YAML error, with line and column where known."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        context = f"{error.context}, " if error.context else ""
        return f"line {mark.line + 1}, column {mark.column + 1}: {context}{error.problem}"
    if isinstance(error, ReaderError):
        return f"it holds the control character {error.character:#06x}"
    return str(error)


def read_file(path: Path) -> dict[str, Any]:
    """Read the nested mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, a folder, not UTF-8, not YAML or not a mapping.
    """
    try:
        data = read_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        order = " The YAML file comes first, then key=value." if "=" in str(path) else ""
        raise ConfigError([f"The configuration {path} does not exist: give the path of a YAML file.{order}"]) from None
    except IsADirectoryError:
        raise ConfigError([f"The configuration {path} is a folder: give the path of a YAML file in it."]) from None
    except OSError as error:
        raise ConfigError([f"The configuration {path} cannot be read: {error.strerror}."]) from error
    except UnicodeDecodeError as error:
        position = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise ConfigError([f"The configuration {path} is not UTF-8 text ({position}): save it as UTF-8."]) from error
    except YAMLError as error:
        raise ConfigError([f"The configuration {path} is not valid YAML, {_sentence(error)}."]) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            [f"The configuration {path} holds {show(data)} at its top level, but must hold sections (name: value)."]
        )
    return data


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Read ``key=value``: a dotted path and a YAML value, as in ``optimizer.learning_rate=1e-6``.

    Text settings take the value literally (``data.path=2024`` is a folder's name).

    Raises:
        ConfigError: ``=``, key or value is missing, or the value is not YAML.
    """
    if problem := _unusable(text):
        raise ConfigError([f"The override {shown(text)} cannot be used ({problem}): write it in UTF-8, without NUL."])
    key, equals, value = text.partition("=")
    key, value = key.strip().removeprefix("--"), value.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError([f"The override '{printable(text)}' is not of the form key=value, such as train.steps=100."])
    if not value:
        raise ConfigError(
            [f"The override '{printable(text)}' has no value: write {key}=null for null, {key}='\"\"' for empty text."]
        )
    path = split_path(key)
    try:
        data = read_yaml(value)
    except YAMLError as error:
        data = error
    schema, rest = locate(path)
    is_text = not rest and resolve(schema).get("type") == "string" and "enum" not in resolve(schema)
    if is_text and not isinstance(data, str) and not (data is None and is_nullable(schema)):
        return path, value
    if isinstance(data, YAMLError):
        raise ConfigError(
            [f"The value in the override '{printable(text)}' is not valid YAML, {_sentence(data)}."]
        ) from data
    return path, data


def split_path(key: str) -> tuple[str, ...]:
    """Split a dotted path. In a section with free names, as in ``rewards.functions.package.module.function``, the rest
    is one name."""
    steps = key.split(".")
    for depth in range(1, len(steps)):
        schema, rest = locate(steps[:depth])
        if not rest and isinstance(resolve(schema).get("additionalProperties"), Mapping):
            return (*steps[:depth], ".".join(steps[depth:]))
    return tuple(steps)


def merge(given: Mapping[str, Any], overrides: Sequence[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Return a copy of nested settings with values set by path; later ones win."""
    result = copy.deepcopy(dict(given))
    for path, value in overrides:
        section = result
        for step in path[:-1]:
            if not isinstance(section.get(step), dict):
                section[step] = {}
            section = section[step]
        section[path[-1]] = value
    return result


def _without(given: Mapping[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    """Return the settings without the one at a path; for an entry of a list, without the list."""
    result = copy.deepcopy(dict(given))
    section = result
    names = [step for step in path if isinstance(step, str)]
    for step in names[:-1]:
        section = section[step]
    section.pop(names[-1], None)
    return result


def build_config(given: Mapping[str, Any], *, purpose: Purpose | None = None, is_whole: bool = True) -> Config:
    """Validate nested settings and fill in the defaults. A section without content counts as empty.

    Args:
        given: the settings.
        purpose: what they are checked for.
        is_whole: report contradictions between settings too; False if some are still to come (:func:`check_config`).

    Raises:
        ConfigError: with a sentence for every problem, in the order of the settings.
    """
    data = {key: {} if value is None and _is_section(key) else value for key, value in given.items()}
    problems: list[Problem] = []
    try:
        config = _validate(data)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            problems += field_problem(error)
            data = _without(data, error["loc"])
        # The rest is valid, so contradictions between settings can be reported too.
        config = _validate(data)
    bad = [path for problem in problems for path in problem.paths]
    for problem in cross_checks(config, purpose) if is_whole else ():
        if not any(path[: len(other)] == other for path in problem.paths for other in bad):
            problems.append(problem)
    if problems:
        raise ConfigError(list(dict.fromkeys(problem.sentence for problem in problems)))
    return config


def _is_section(key: str) -> bool:
    schema, rest = locate((key,))
    return not rest and "properties" in resolve(schema) and not is_nullable(schema)


def _validate(data: Mapping[str, Any]) -> Config:
    # Through JSON, because strict mode then accepts a list for a tuple and 1 for 1.0, but not "1" or true for 1.
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:  # from Python, where a value may be anything
        raise ConfigError([f"A setting is neither text, a number nor a list of them ({error})."]) from error
    return Config.model_validate_json(text, strict=True)


@dataclass(frozen=True)
class Loaded:
    """Settings and where they came from."""

    config: Config
    given: Mapping[str, Any]
    """File and overrides, merged and nested, without defaults."""
    overridden: frozenset[str]
    """Dotted paths given on the command line."""


def check_config(config: Config, purpose: Purpose) -> None:
    """Check that valid settings do not contradict each other for a purpose.

    Raises:
        ConfigError: with a sentence for every contradiction.
    """
    if problems := [problem.sentence for problem in cross_checks(config, purpose)]:
        raise ConfigError(list(dict.fromkeys(problems)))


def load_config(path: str | Path, overrides: Sequence[str] = (), *, purpose: Purpose | None = None) -> Loaded:
    """Read a YAML file, apply ``key=value`` overrides and validate the result for a purpose.

    Raises:
        ConfigError: the file cannot be read, or with a sentence for every problem.
    """
    given = read_file(Path(path))
    parsed: list[tuple[tuple[str, ...], Any]] = []
    problems: list[str] = []
    for text in overrides:
        try:
            parsed.append(parse_override(text))
        except ConfigError as error:
            problems += error.problems
    merged = merge(given, parsed)
    try:
        config = build_config(merged, purpose=purpose)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return Loaded(config, merged, frozenset(".".join(path) for path, _ in parsed))


def show_config(loaded: Loaded) -> str:
    """Return the resolved settings as YAML; a comment marks those that were given, and where."""
    given = leaves(loaded.given)
    lines: list[str] = []

    def write(section: Mapping[str, Any], prefix: str, indent: str) -> None:
        for name, value in section.items():
            path = f"{prefix}{name}"
            if isinstance(value, Mapping) and value:
                lines.append(f"{indent}{write_yaml(name, inline=True)}:")
                write(value, f"{path}.", indent + "  ")
                continue
            line = f"{indent}{write_yaml(name, inline=True)}: {write_yaml(value, inline=True)}"
            if path in loaded.overridden:
                line += "  # given on the command line"
            elif path in given:
                line += "  # given in the file"
            lines.append(line)

    write(loaded.config.model_dump(mode="json"), "", "")
    return "\n".join(lines) + "\n"
