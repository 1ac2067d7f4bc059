"""Names that are not UTF-8: refused in a sentence by every verb, before anything is written.

Run: pytest tests/cli/test_names.py
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.cli.common import verb
from medvqa_rl.core.files import write_json
from medvqa_rl.evaluation.records import write_records
from medvqa_rl.evaluation.statistics.compare import read_evaluations
from medvqa_rl.report.runs import read_run
from tests.records import make_record

BAD = os.fsdecode(b"scan\xff.yaml")


def verbs(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, (*path, name))
        else:
            yield (*path, name), command


def takes_text(parameter: Any, annotations: Mapping[str, inspect.Parameter]) -> bool:
    """Whether it is a path or a free text, one or several."""
    if parameter.name in ("overrides", "help"):
        return False
    given, *_ = get_args(annotations[parameter.name].annotation)
    return bool(
        {Path, str} & {given, *get_args(given), *(inner for one in get_args(given) for inner in get_args(one))}
    )


def calls() -> Iterator[list[str]]:
    """Each verb with a bad name in one of its arguments and options, and good ones in what else it needs."""
    for path, command in verbs(typer.main.get_command(app)):
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        required = [one for one in command.params if one.required]
        annotations = inspect.signature(command.callback.__wrapped__, eval_str=True).parameters
        for bad in [one for one in command.params if takes_text(one, annotations)]:
            words = [*path]
            for one in arguments:
                if one is bad or one.required:
                    words += [BAD if one is bad else "x"] * (2 if one.nargs == -1 else 1)
            for one in command.params:
                if one not in arguments and (one is bad or one in required):
                    words += [one.opts[0], BAD if one is bad else "1"]
            yield words


@pytest.mark.parametrize(
    "words", list(calls()), ids=lambda words: " ".join(word for word in words if word not in (BAD, "x"))
)
def test_an_argument_that_is_not_utf8_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "error: The argument 'scan\\udcff.yaml' is not UTF-8: write it in UTF-8" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_working_folder_that_is_not_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / os.fsdecode(b"\xe9tude")
    folder.mkdir()
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["config", "show", "config.yaml"])
    assert result.exit_code == 2 and "error: The name of the working folder" in result.stderr
    assert "etude' is not UTF-8: rename it, or run from another folder." in result.stderr.replace("\\udce9", "e")


def test_the_target_of_a_link_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / os.fsdecode(b"im\xff")
    target.mkdir()
    (tmp_path / "link").symlink_to(target)

    def write() -> None:
        write_json(tmp_path / "data.json", {"folder": str((tmp_path / "link").resolve())})

    with pytest.raises(typer.Exit) as ended:
        verb(write)()
    said = capsys.readouterr().err
    assert ended.value.exit_code == 2 and "error: A name or a text is not UTF-8 and cannot be written" in said
    assert "im\\udcff" in said and sorted(path.name for path in tmp_path.iterdir()) == [target.name, "link"]


def test_an_evaluation_with_such_a_name_is_refused_or_left_out_of_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "eval" / os.fsdecode(b"x\xff")
    folder.mkdir(parents=True)
    write_records([make_record()], folder / "samples.jsonl")
    (folder / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^The name of the folder '.*x\\udcff' is not UTF-8: rename it\.$"):
        read_evaluations(tmp_path / "run")
    found = read_run(tmp_path / "run")
    assert found.evaluations == [] and "The name of the evaluation 'x\\udcff' is not UTF-8: it is skipped." in (
        found.problems
    )


@pytest.mark.parametrize("override", ["output_dir=a\udcff", "model.path=\ud800", "data.pat\udcffh=x"])
def test_an_override_that_is_not_utf8_is_refused(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    for words in (["config", "show"], ["train"], ["eval"], ["data", "check"], ["estimate"]):
        result = CliRunner().invoke(app, [*words, "config.yaml", override])
        assert result.exit_code == 2 and "error: The override" in result.stderr and "UTF-8" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("text", ['output_dir: "\\ud800"', 'data: {path: "a\\udcff"}', '"\\ud800": 1'])
def test_half_a_character_in_yaml_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    result = CliRunner().invoke(app, ["train", "config.yaml"])
    assert result.exit_code == 2 and "is not valid YAML, line 1" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
