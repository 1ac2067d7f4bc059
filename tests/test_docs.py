"""The documentation: its commands run or at least parse, its settings exist, its links lead somewhere."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from medvqa_rl.cli.app import app
from medvqa_rl.config import differences
from medvqa_rl.config.schema import all_settings, reference_tables
from medvqa_rl.config.yaml import load_config, read_file
from medvqa_rl.phantom.demo import demo_config
from tests import forking

ROOT = Path(__file__).parents[1]
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PURPOSES: dict[str, Any] = {"train": "train", "sft": "sft", "eval": "eval", "show": None, "check": "eval"}
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n$")
README = "the project's first page: it installs the package, trains for minutes and uses a GPU"
PROSE = {"bash", "console", "shell"}
"""Languages that would hide a block of commands from these tests."""

SMALL = {
    "train": "train.prompts_per_step=1 train.prompts_per_micro_batch=1 optimizer.warmup_steps=0 "
    "rollout.num_generations=2 rollout.max_completion_length=16 data.num_val=4",
    "eval": "rollout.max_completion_length=16 data.num_test=6 data.num_val=4 eval.bootstrap=50",
    "calibrate": "--count 8",
    "rewards": "--questions 2",
}
"""What is added to a command, by verb, so that it ends within seconds."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str
    reason: str
    """Why it is not run; empty if it is."""


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        marked = NOT_RUN.search(text[: found.start()])
        reason = README if page.name == "README.md" else marked[1] if marked else ""
        yield Block(str(page.relative_to(ROOT)), found[1], found[2], reason)


BLOCKS = [block for page in MARKDOWN for block in blocks(page)]
READING_ORDER = ["docs/quickstart.md", "docs/your-own-data.md"]
"""Pages whose commands others build on."""


def words_of(text: str) -> Iterator[list[str]]:
    """The words of every command in a text."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command, with its page: shell blocks of Markdown, indented comments of YAML."""
    for block in BLOCKS:
        if block.language == "sh":
            yield from ((block.page, words) for words in words_of(block.text))
    for page in CONFIGS:
        text = "\n".join(re.findall(r"^#   (\S.*)$", page.read_text(encoding="utf-8"), re.MULTILINE))
        yield from ((page.name, words) for words in words_of(text))


COMMANDS = list(commands())


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
    assert len(COMMANDS) > 80
    assert {words[0] for _, words in COMMANDS} >= {"make", "medvqa-rl", "accelerate", "python"}
    assert not [block for block in BLOCKS if block.language in PROSE], "write sh, so that the commands are tested"


def steps() -> list[tuple[str, list[str]]]:
    """What is run, with its page: commands with small settings, and Python blocks."""
    order = sorted(BLOCKS, key=lambda block: READING_ORDER.index(block.page) if block.page in READING_ORDER else 9)
    found: list[tuple[str, list[str]]] = []
    for block in order:
        if block.reason:
            continue
        if block.language == "python":
            found.append((block.page, ["python", block.text]))
        elif block.language == "sh":
            for number, words in enumerate(words_of(block.text)):
                verb = next(word for word in words[1:] if not word.startswith("--") and word not in ("off", "judge"))
                added = SMALL.get(verb, "").split()
                if verb == "train" and "--dry-run" not in words:
                    named = any(word.startswith("output_dir=") for word in words) or "my-project/config.yaml" in words
                    added += [] if named else [f"output_dir=runs/{len(found)}-{number}"]
                    added += [] if any(word.startswith("train.steps=") for word in words) else ["train.steps=2"]
                found.append((block.page, [*words, *added]))
    return found


STEPS = steps()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of all steps, run in one folder that holds configs/ and the files that blocks show."""
    folder = tmp_path_factory.mktemp("documented")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for block in BLOCKS:
        if name := re.match(r"# (\w+\.py)\n", block.text):
            (folder / name[1]).write_text(block.text, encoding="utf-8")
    (folder / "steps.json").write_text(json.dumps([step for _, step in STEPS]), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:.", "XDG_CACHE_HOME": str(folder / "cache")}
    script = [sys.executable, str(ROOT / "tests" / "documented.py"), "steps.json"]
    done = forking.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines] == [step for _, step in STEPS], done.stderr[-2000:]
    return lines


@pytest.mark.parametrize("number", range(len(STEPS)), ids=[f"{page}: {' '.join(step)[:90]}" for page, step in STEPS])
def test_every_block_runs_unless_marked(results: list[dict[str, Any]], number: int) -> None:
    assert results[number]["code"] == 0, results[number]["printed"][-3000:]


def check_other_command(words: list[str]) -> None:
    """Check a command that is not ours as far as that is possible without running it."""
    if words[0] in {"taskset", "env"}:
        words = words[words.index("python") :]
    if words[0] == "python":
        assert words[1] == "-m" and words[2].startswith("benchmarks.")
        source = (ROOT / words[2].replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words[3:] if word.startswith("--"))
    elif words[0] == "benchmarks/gpu.sh":
        assert (ROOT / words[0]).is_file()
    else:
        known = {"git", "cd", "source", "pip", "python3", "docker", ".venv/bin/pre-commit", "vllm", "..."}
        assert words[0] in known, f"unknown command {words[0]}"


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS])
def test_every_command_in_the_documentation_parses(page: str, words: list[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if not re.match(r"[A-Z_]+=", word)} <= set(targets)
        return
    if words[0] == "accelerate":
        assert words[words.index("-m") + 1] == "medvqa_rl"
        words = words[words.index("-m") + 1 :]
    elif words[0] != "medvqa-rl":
        check_other_command([word for word in words if not re.match(r"[A-Z_]+=", word)])
        return
    if words[1:] == ["--install-completion"]:  # which would do so while it is parsed
        assert words[1] in {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
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


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_loop_in_the_readme_is_that_of_the_code() -> None:
    (loop,) = re.findall(
        r"```python\n(for step in steps:\n.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    code = (ROOT / "src" / "medvqa_rl" / "learning" / "grpo.py").read_text("utf-8")
    lines = [line.strip() for line in loop.splitlines()]
    assert len(lines) > 5 and not [line for line in lines if f"    {line}\n" not in code]


def test_the_demo_runs_the_settings_of_its_file(tmp_path: Path) -> None:
    loaded = load_config(ROOT / "configs" / "phantom_cpu.yaml", [f"output_dir={tmp_path}"], purpose="train")
    assert differences(demo_config(tmp_path, seed=0), loaded.config) == []


def messages() -> Iterator[tuple[str, str]]:
    """The text literals of the source, without docstrings, and the page templates; placeholders become ``{}``."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                inside.add(node.value)
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
                yield path.name, "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
                yield path.name, node.value
    for path in sorted((ROOT / "src").rglob("*.j2")):
        styles = r"<style>.*?</style>|var\(--[\w-]+|--[\w-]+:"
        yield path.name, re.sub(styles, "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def verbs() -> dict[str, set[str]]:
    """The options of each verb, such as ``data check``."""
    found: dict[str, set[str]] = {}

    def visit(command: Any, name: str) -> None:
        found[name] = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for word, inner in getattr(command, "commands", {}).items():
            visit(inner, f"{name} {word}".strip())

    visit(typer.main.get_command(app), "")
    return found


FOREIGN = {
    *("--logprobs-mode", "--generation-config", "--mm-processor-kwargs", "--enable-lora", "--max-lora-rank"),
    *("--enable-scale-out", "--no-enable-chunked-prefill", "--worker-extension-cls", "--dtype"),
    *("--config_file", "--help"),
}
"""Options of other programs that messages name."""
FORMATS = {"rating key ", "ratings "}
"""Names of file formats, which are no verbs."""


def test_messages_suggest_options_settings_and_verbs_that_exist() -> None:
    known = verbs()
    options = set.union(*known.values()) | FOREIGN
    settings = {name for name, _ in all_settings()}
    sections = "|".join(sorted({name.partition(".")[0] for name in settings if "." in name}))
    files = {"json", "jsonl", "yaml", "log", "csv", "md", "html", "py", "png", "safetensors"}
    unknown = []
    for place, text in messages():
        if " " not in text:
            continue  # an argument or a key, not a message
        unknown += [(place, word) for word in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text) if word not in options]
        for name in re.findall(rf"(?<![\w./:-])((?:{sections})(?:\.[a-z][a-z_0-9]*)+)(?![\w(/])", text):
            is_setting = any(name == setting or name.startswith(f"{setting}.") for setting in settings)
            if not is_setting and name.rpartition(".")[2] not in files:
                unknown.append((place, name))
        for name in re.findall(r"`?medvqa-rl ((?:[a-z]+ ?){1,2})", text):
            if name not in FORMATS and not any(
                name.strip() == verb or name.startswith(f"{verb} ") for verb in known if verb
            ):
                unknown.append((place, f"medvqa-rl {name}"))
    assert unknown == []
