"""What pip installs: bounds in pyproject.toml, pins in constraints.txt, and the releases that were tested."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from medvqa_rl.core.packages import TESTED, is_too_old, was_tested

ROOT = Path(__file__).parents[1]


def project() -> Mapping[str, list[Requirement]]:
    """The requirements by extra; those that are always installed under the empty name."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": found["dependencies"], **found["optional-dependencies"]}
    return {extra: list(map(Requirement, lines)) for extra, lines in groups.items()}


def pins() -> dict[str, Version]:
    """The versions in constraints.txt by normalised name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, Version] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)  # no extras, markers or builds such as +cpu
        assert match is not None, f"not a pin: {line}"
        name = canonicalize_name(match[1])
        assert name not in found, f"pinned twice: {name}"
        found[name] = Version(match[2])
    return found


@pytest.mark.parametrize(
    "requirement",
    [requirement for extra in ("", "dev", "docs", "deepspeed") for requirement in project()[extra]],
    ids=str,
)
def test_what_ci_installs_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt has no version of {requirement.name}"
    assert requirement.specifier.contains(version, prereleases=True)


def test_make_installs_the_pinned_versions() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (install,) = re.findall(r"^PIP := .*$", makefile, re.MULTILINE)
    assert "-c constraints.txt" in install
    rules = dict(re.findall(r"^\.venv/(installed[\w-]*): (.*)$", makefile, re.MULTILINE))
    assert rules.keys() == {"installed", "installed-dev", "installed-docs", "installed-ranks"}
    assert all("constraints.txt" in needed.split() for needed in rules.values())


@pytest.mark.parametrize("name", TESTED)
def test_the_bounds_are_the_releases_that_were_tested(name: str) -> None:
    """pip refuses what the code calls too old, and nothing newer than what was tested: newer releases only warn."""
    (specifier,) = {
        str(r.specifier): r.specifier for group in project().values() for r in group if r.name == name
    }.values()
    tested = TESTED[name]
    oldest = Version(tested.oldest)
    assert specifier.contains(oldest) and not specifier.contains(f"{oldest.major}.{oldest.minor - 1}.99")
    assert specifier.contains(f"{Version(tested.newest).major}.{Version(tested.newest).minor + 1}.1")
    assert is_too_old(name, f"{oldest.major}.{oldest.minor - 1}.99") and not is_too_old(name, tested.oldest)


def test_the_readme_names_the_releases_that_were_tested() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"{name} {tested}" in text for name, tested in TESTED.items() if name != "vllm")


def test_ci_runs_releases_that_count_as_tested() -> None:
    found = pins()
    assert all(was_tested(name, str(found[name])) for name in TESTED if name != "vllm")
