"""Releases outside what was tested warn once, and those that are too old are refused."""

from __future__ import annotations

from importlib import metadata

import pytest

from medvqa_rl import __version__
from medvqa_rl.core import packages
from medvqa_rl.core.packages import Releases, check_installed, installed, is_too_old, was_tested


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, to change; two packages were tested in 2.11 to 2.14 and in 0.32."""
    versions = {"torch": "2.13.0+cpu", "vllm": "0.32.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages.metadata, "version", version)
    monkeypatch.setattr(packages, "TESTED", {"torch": Releases("2.11", "2.14"), "vllm": Releases("0.32", "0.32")})
    return versions


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git123", "2.13.0+cpu", "2.14.9.post1"])
def test_releases_that_were_tested_pass_in_every_build(found: dict[str, str], version: str) -> None:
    found["torch"] = version
    assert check_installed(["torch", "vllm"]) is None


def test_newer_releases_warn_in_one_sentence_that_says_how_to_go_back(found: dict[str, str]) -> None:
    found |= {"torch": "2.15.0+cu130", "vllm": "1.0"}
    assert check_installed(["torch"]) == (
        "Warning: not tested with torch 2.15.0+cu130 (but with 2.11 to 2.14); if something fails, `pip install "
        "'torch==2.14.*'` goes back."
    )
    both = check_installed(["torch", "vllm"])
    assert both is not None and "torch 2.15.0+cu130 (but with 2.11 to 2.14) and vllm 1.0 (but with 0.32)" in both
    assert "`pip install 'torch==2.14.*' 'vllm==0.32.*'`" in both


@pytest.mark.parametrize("version", ["2.10.2", "1.13", "0.4"])
def test_older_releases_are_refused_with_the_command(found: dict[str, str], version: str) -> None:
    found["torch"] = version
    with pytest.raises(ValueError, match=rf"^torch {version} is too old: run `pip install 'torch>=2\.11'`\.$"):
        check_installed(["torch"])


def test_a_missing_package_is_named_with_its_command(found: dict[str, str]) -> None:
    del found["torch"]
    with pytest.raises(ValueError, match=r"^torch is not installed: run `pip install 'torch>=2\.11'`\.$"):
        check_installed(["torch"])


def test_a_version_that_cannot_be_read_was_not_tested(found: dict[str, str]) -> None:
    assert not was_tested("torch", "unknown") and not is_too_old("torch", "unknown")
    found["torch"] = "main\x1b[31m"
    warning = check_installed(["torch"])
    assert warning is not None and "torch main" in warning and "\x1b" not in warning


def test_versions_of_what_is_installed(found: dict[str, str]) -> None:
    assert installed(["torch", "medvqa-rl", "nowhere"]) == {"torch": "2.13.0+cpu", "medvqa-rl": __version__}
