"""Settings that no computer can use are refused in one printable sentence."""

from pathlib import Path

import pytest
from ruamel.yaml.error import YAMLError

from medvqa_rl.config import ConfigError
from medvqa_rl.config.yaml import MAX_DEPTH, load_config, read_yaml

CONFIG = Path(__file__).parents[2] / "configs" / "phantom_cpu.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: " + b"[" * 2_000, "is not valid YAML, its lists and sections are nested too deeply."),
        (b"- " * 2_000, "is not valid YAML, its lists and sections are nested too deeply."),
        (b'data: {path: "\\ud800"}', "is not valid YAML, line 1, column 14: a text is not valid Unicode."),
        (b'"\\ud800": 1', "is not valid YAML, line 1, column 1: a text is not valid Unicode."),
        (b'data: {path: "\\0"}', "is not valid YAML, line 1, column 14: a text holds the character NUL."),
        (b"train: {steps: 1" + b"0" * 400 + b"}", "line 1, column 16: a number has more than 30 digits."),
        (b"train: {steps: " + b"9" * 6_000 + b"}", "line 1, column 16: a number has more than 30 digits."),
        (b"train: {steps: 0x" + b"f" * 400 + b"}", "line 1, column 16: a number has more than 30 digits."),
        (b"train: {steps: 1" + b"0" * 400 + b".0}", "train.steps is Infinity, but must be a whole number"),
        (b"a: \xed\xa0\x80", "is not UTF-8 text (byte 3 is 0xed): save it as UTF-8."),
        (b"a: \x1b[2J", "is not valid YAML, it holds the control character 0x001b."),
        (b'"\\e[2J": 3', "\\x1b[2J (given as 3) is not a setting"),
        (b'data: {path: "\\e[2J"}', "data.path is \\x1b[2J, but data.name is phantom"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert all(problem.isprintable() and len(problem) < 2_000 for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.path=\udcff",
            "The override 'data.path=\\udcff' cannot be used (a text is not valid Unicode): write it",
        ),
        ("\ud800=3", "The override '\\ud800=3' cannot be used"),
        ("data.path=a\0b", "(a text holds the character NUL)"),
        ("train.steps=1" + "0" * 400, "is not valid YAML, line 1, column 1: a number has more than 30 digits."),
        ("train.steps=" + "[" * 2_000, "is not valid YAML, its lists and sections are nested too deeply."),
        ("train.steps=\x1b[2J", "is not valid YAML, it holds the control character 0x001b."),
        ("\x1b[2J", "The override '\\x1b[2J' is not of the form key=value"),
    ],
)
def test_a_hostile_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, [override])
    assert message in str(caught.value)
    assert all(problem.isprintable() and len(problem) < 2_000 for problem in caught.value.problems)


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ("{a: ", "}"), ("- ", "")])
def test_fifty_levels_are_read_and_no_more(start: str, end: str) -> None:
    data = read_yaml(start * MAX_DEPTH + "1" + end * MAX_DEPTH)
    for _ in range(MAX_DEPTH):
        (data,) = data.values() if isinstance(data, dict) else data
    assert data == 1
    with pytest.raises(YAMLError, match="nested too deeply"):
        read_yaml(start * (MAX_DEPTH + 1) + "1" + end * (MAX_DEPTH + 1))


def test_whole_numbers_of_thirty_digits_and_text_of_digits_are_read() -> None:
    assert read_yaml("a: 123456789012345678901234567890") == {"a": 123456789012345678901234567890}
    loaded = load_config(CONFIG, ["output_dir=" + "9" * 60])
    assert loaded.config.output_dir == "9" * 60
