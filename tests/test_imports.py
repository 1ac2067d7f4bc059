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

LEVELS = [
    {"core"},
    {"config"},
    {"data", "models"},
    {"rollout", "rewards"},
    {"evaluation"},
    {"learning"},
    {"report"},
    {"phantom", "study"},
    {"cli"},
]
"""From the ground up: a folder imports from itself and from the levels before its own."""

LIGHT = {"core", "config", "data", "evaluation/statistics", "learning/estimate", "report", "study"}
"""Folders that import without torch; so do ``medvqa_rl.cli``, until a verb runs, and ``medvqa_rl.api``."""

MAX_LINES = 400
MAX_MODULES = 12
OTHER_NAMES = {
    "PIL": "pillow",
    "ruamel": "ruamel.yaml",
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
    """Modules that a file imports, for type checkers too; without those inside functions if asked."""

    def visit(node: ast.AST) -> Iterator[str]:
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


def level(module: str) -> int:
    """The level of a module's folder."""
    (found,) = [number for number, folders in enumerate(LEVELS) if module.partition(".")[0] in folders]
    return found


def folder(module: str) -> str:
    """The first folder of a module."""
    return module.partition(".")[0]


def test_the_root_has_the_folders_of_the_house() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set().union(*LEVELS)
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {
        "__init__.py",
        "__main__.py",
        "api.py",
        "py.typed",
    }


@pytest.mark.parametrize("name", sorted(set().union(*LEVELS)))
def test_imports_point_one_way(name: str) -> None:
    wrong = {
        f"{module} -> {other}"
        for module, path in MODULES.items()
        if folder(module) == name
        for other in own_imports(path)
        if folder(other) != name and level(other) >= level(module)
    }
    assert not wrong, f"these go against the direction: {sorted(wrong)}"


def test_no_folder_is_crowded_and_no_module_long() -> None:
    for path in [PACKAGE, *PACKAGE.rglob("*")]:
        if path.is_dir():
            assert len([*path.glob("[!_]*.py")]) <= MAX_MODULES, f"{path} has too many modules"
        elif path.suffix == ".py":
            count = len(path.read_text(encoding="utf-8").splitlines())
            assert count <= MAX_LINES, f"{path} has {count} lines"


def test_nothing_imports_in_a_circle() -> None:
    graph = {module: own_imports(path, only_at_import=True) - {module} for module, path in MODULES.items()}
    done: set[str] = set()
    while ready := {module for module, others in graph.items() if module not in done and others <= done}:
        done |= ready
    assert not graph.keys() - done, f"circular imports among {sorted(graph.keys() - done)}"


def test_only_families_and_the_phantom_world_know_an_architecture() -> None:
    """Outside, the name of an architecture stands only in the Hub ids of suggested models."""
    names = re.compile(r"qwen|gemma|internvl|deepstack|\.visual\b|\bmerger\b", re.IGNORECASE)
    hub_id = re.compile(r"[\w.-]+/[\w.-]+")
    for module, path in MODULES.items():
        if not module.startswith(("models.families", "phantom", "cli.phantom")):
            found = names.search(hub_id.sub("", path.read_text(encoding="utf-8")))
            assert not found, f"{path} names {found[0]}"


def test_light_modules_import_without_torch() -> None:
    light = tuple(name.replace("/", ".") for name in LIGHT)
    names = ["medvqa_rl.cli", "medvqa_rl.api", *(f"medvqa_rl.{name}" for name in MODULES if name.startswith(light))]
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
