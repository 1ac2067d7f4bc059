"""Imports point one way, are declared, and the light modules do not bring in torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "medvqa_rl"

LAYERS = [
    [
        "randomness",
        "types",
        "prompts",
        "config",
        "data_problems",
        "judge_problems",
        "vllm_problems",
        "problems",
        "quantized_problems",
        "settings",
        "progress",
        "memory",
        "network",
        "keys",
    ],
    ["phantom", "data", "models"],
    ["judges", "rollout"],
    ["rewards"],
    ["evaluation"],
    ["learning"],
    [
        "phantom.build",
        "phantom.demo",
        "phantom.judge",
        "phantom.judge_lessons",
        "phantom.lm",
        "phantom.seeing",
        "report",
    ],
    ["hardware"],
    ["study"],
    ["commands"],
    ["eval_command", "export_command", "judge_command", "judge_eval_command", "rating_command"],
    [
        "cli",
        "cli_common",
        "cli_data",
        "cli_estimate",
        "cli_eval",
        "cli_init",
        "cli_judge",
        "cli_report",
        "cli_study",
        "data_commands",
        "data_files",
        "estimate_command",
        "init_command",
        "launching",
        "project_template",
        "__main__",
    ],
]
"""From the ground up: a module imports from its own layer and those above it in this list."""

LIGHT = [
    "cli",
    "cli_common",
    "cli_data",
    "cli_estimate",
    "cli_eval",
    "cli_init",
    "cli_judge",
    "cli_report",
    "cli_study",
    "config",
    "data",
    "data.division",
    "data.export",
    "data.fingerprints",
    "data.images",
    "data.sheet",
    "data_commands",
    "data_files",
    "estimate_command",
    "evaluation",
    "evaluation.agreement",
    "evaluation.answering",
    "evaluation.compare",
    "evaluation.controls",
    "evaluation.data_check",
    "evaluation.evaluate",
    "evaluation.instruments",
    "evaluation.measured",
    "evaluation.judge_bias",
    "evaluation.judged",
    "evaluation.metrics",
    "evaluation.raters",
    "evaluation.ratings",
    "evaluation.records",
    "evaluation.similarity",
    "evaluation.stability",
    "evaluation.stats",
    "evaluation.store",
    "evaluation.summary",
    "evaluation.tables",
    "hardware",
    "init_command",
    "judge_eval_command",
    "judges",
    "judges.cache",
    "judges.embedded_grader",
    "judges.endpoint",
    "judges.load",
    "judges.prompts",
    "judges.rubric",
    "keys",
    "launching",
    "learning.footprint",
    "learning.launch",
    "learning.mixing",
    "learning.pace",
    "models.cost",
    "models.sizes",
    "network",
    "problems",
    "project_template",
    "prompts",
    "quantized_problems",
    "randomness",
    "rating_command",
    "report",
    "report.data_page",
    "report.card",
    "report.figures",
    "report.page",
    "report.rating_sheet",
    "report.report",
    "report.watch",
    "rewards",
    "settings",
    "study",
    "study.collect",
    "study.factors",
    "study.figures",
    "study.findings",
    "study.leaks",
    "study.output",
    "study.recipe",
    "study.running",
    "study.signs",
    "study.tables",
    "types",
    "vllm_problems",
]
OTHER_NAMES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "huggingface_hub": "huggingface-hub",
    "sentence_transformers": "sentence-transformers",
}


def module_name(path: Path) -> str:
    """``learning.grpo`` for src/medvqa_rl/learning/grpo.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """Modules that a file imports, those for type checkers left out and, if asked, those inside functions."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if only_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def own_imports(path: Path, *, only_at_import: bool = False) -> set[str]:
    """Modules of this package that a file imports."""
    names = {name.removeprefix("medvqa_rl.") for name in imports(path, only_at_import=only_at_import)}
    return {name for name in names if name in MODULES and name}


def layer(module: str) -> int:
    """The layer of a module: its own, or that of its package."""
    for name in (module, module.partition(".")[0]):
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
    raise AssertionError(f"{module} is in no layer: put it into LAYERS")


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_one_way(module: str) -> None:
    wrong = [other for other in own_imports(MODULES[module]) if layer(other) > layer(module)]
    assert not wrong, f"{module} imports {wrong} from a higher layer"


def test_nothing_imports_in_a_circle() -> None:
    graph = {module: own_imports(path, only_at_import=True) - {module} for module, path in MODULES.items()}
    done: set[str] = set()
    while ready := {module for module, others in graph.items() if module not in done and others <= done}:
        done |= ready
    assert not graph.keys() - done, f"circular imports among {sorted(graph.keys() - done)}"


def test_light_modules_import_without_torch() -> None:
    names = [f"medvqa_rl.{name}" for name in LIGHT if name in MODULES]
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = sys.modules.keys() & {'torch', 'transformers', 'peft', 'accelerate'}\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_imported_packages_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[<>=~!\[; ]", requirement)[0].lower() for group in lists for requirement in group}
    used = {name.partition(".")[0] for path in MODULES.values() for name in imports(path)}
    third_party = used - set(sys.stdlib_module_names) - {"medvqa_rl"}
    undeclared = {OTHER_NAMES.get(name, name) for name in third_party} - {name.replace("_", "-") for name in declared}
    assert not undeclared
