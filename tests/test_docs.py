"""The documentation: its commands parse, its settings exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from medvqa_rl.cli.app import app
from medvqa_rl.config import differences
from medvqa_rl.config.schema import all_settings, reference_tables
from medvqa_rl.config.yaml import load_config, read_file
from medvqa_rl.phantom.demo import demo_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "configs").rglob("*.yaml"))
PURPOSES: dict[str, Any] = {"train": "train", "sft": "sft", "eval": "eval", "show": None, "check": "train"}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page: shell blocks of Markdown, indented comments of YAML."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        blocks = ["\n".join(re.findall(r"^#   (\S.*)$", text, re.MULTILINE))]
    else:
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


def parse(arguments: list[str]) -> Any:
    """Parse arguments with the real command line, running nothing. Returns the context of the verb."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("medvqa-rl", list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 25
    assert {words[0] for _, words in COMMANDS} >= {"make", "medvqa-rl", "accelerate"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS])
def test_every_command_in_the_documentation_parses(page: str, words: list[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] == "accelerate":
        assert words[words.index("-m") + 1] == "medvqa_rl"
        words = words[words.index("-m") + 1 :]
    elif words[0] != "medvqa-rl":
        assert words[0] in {"git", "cd", "source", "pip", ".venv/bin/pre-commit"}, f"unknown command {words[0]}"
        return
    context = parse(words[1:])
    if context.info_name in PURPOSES and "config" in context.params:
        if context.params["config"].parts[0] != "configs":
            return  # a run's folder, or a file that a command before it writes
        path = ROOT / context.params["config"]
        load_config(path, context.params["overrides"] or (), purpose=PURPOSES[context.info_name])


def test_the_papers_settings_differ_in_the_two_lines_of_dr_grpo() -> None:
    first, second = (read_file(ROOT / "configs" / name) for name in ("grpo.yaml", "dr_grpo.yaml"))
    assert first["advantage"] == {"scale": "group"} and second["advantage"] == {"scale": "none"}
    assert first["loss"]["type"] == "grpo" and second["loss"]["type"] == "dr_grpo"
    second |= {"output_dir": first["output_dir"], "advantage": first["advantage"]}
    second["loss"]["type"] = "grpo"
    assert first == second


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text.rstrip().endswith(reference_tables().rstrip()), (
        "docs/configuration.md is out of date: replace its tables by the output of `medvqa-rl config tables`"
    )
    assert all(f"`{name}`" in text for name, field in all_settings() if "." in name and "$ref" not in field)


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_demo_runs_the_settings_of_its_file(tmp_path: Path) -> None:
    loaded = load_config(ROOT / "configs" / "phantom_cpu.yaml", [f"output_dir={tmp_path}"], purpose="train")
    assert differences(demo_config(tmp_path, seed=0), loaded.config) == []
