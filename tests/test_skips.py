"""In CI, a skip that is not marked ``gpu`` fails; elsewhere it is a skip. Without real data its tests are left out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    pytest.skip("no CUDA device")

def test_with_a_library():
    pytest.importorskip("no_such_library")

@pytest.mark.skipif(True, reason="no browser")
def test_with_a_program():
    pass

@pytest.mark.xfail
def test_known_to_fail():
    raise ValueError

@pytest.fixture
def loaded(shared_data):
    return 1 / 0

@pytest.fixture
def shared_data():
    return 1 / 0

def test_on_real_data(loaded):
    pass

def test_that_passes():
    pass
"""
MODULE = "import pytest\npytest.importorskip('no_such_library')\ndef test():\n    pass\n"


def run(folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of pytest on both files, in a project of their own that has no real data."""
    tests = folder / "project" / "tests"
    tests.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("skips.py"), tests / "conftest.py")
    (tests / "test_some.py").write_text(TESTS)
    (tests / "test_module.py").write_text(MODULE)
    options = ["-ra", "-p", "no:cacheprovider", "-p", "no:warnings", "-p", "xdist", "--continue-on-collection-errors"]
    # Where CI is set, pytest prints each reason in full a second time.
    others = ("MEDVQA_", "PYTEST_", "CI", "BUILD_NUMBER")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    clean["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # which takes longer than the tests
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(folder), str(tests)],
        cwd=folder,
        env=clean | {"COLUMNS": "250"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_skip_fails_where_all_tests_must_run(tmp_path: Path, workers: str) -> None:
    code, output = run(tmp_path, MEDVQA_NO_SKIPS="1", PYTEST_ADDOPTS=f"-n {workers}")
    assert code == 1, output
    for reason in ("could not import 'no_such_library'", "no browser"):
        assert reason in output
    assert output.count("MEDVQA_NO_SKIPS=1 allows no skip") == 3
    assert "SKIPPED [1]" in output and "no CUDA device" in output
    assert "1 failed, 1 passed, 1 skipped" in output and "1 xfailed, 2 errors" in output


def test_elsewhere_it_is_a_skip_and_tests_on_real_data_are_left_out(tmp_path: Path) -> None:
    code, output = run(tmp_path)
    assert code == 0, output
    assert "1 passed, 4 skipped, 1 deselected, 1 xfailed" in output
    assert f"{tmp_path / 'shared' / 'data'} does not exist, so the tests on real data" in output
    assert "`apt-get install chromium`" not in output or shutil.which("chromium") is None
    assert "`apt-get install chromium`" in run(tmp_path / "without", PATH="")[1]
