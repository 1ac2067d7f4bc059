"""Ctrl-C while modules are imported, with real signals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
from medvqa_rl import cli
signal.signal(signal.SIGINT, cli._interrupt)
sys.path.insert(0, sys.argv[1])
try:
    {work}
except KeyboardInterrupt:
    print("raised")
"""


@pytest.mark.parametrize(
    ("work", "code", "out", "err"),
    [
        ("import victim", 130, "", "Stopped.\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", 0, "raised\n", ""),
    ],
)
def test_ctrl_c_exits_at_once_only_while_a_module_is_imported(
    tmp_path: Path, work: str, code: int, out: str, err: str
):
    # Torch's C++ code would abort with "terminate called" where this module swallows the exception.
    victim = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "victim.py").write_text(victim)
    command = [sys.executable, "-c", PROGRAM.format(work=work), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
