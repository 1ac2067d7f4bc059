"""Start Python programs from a process that has already imported torch and transformers.

Importing them takes seven seconds of CPU time, more than most of these programs need for their work. ``run`` and
``Popen`` understand what tests give those of :mod:`subprocess`. Each program is a process of its own, forked by
multiprocessing's fork server: it has its own environment, folder, output and exit code, and can be killed.

Not for tests of what happens while modules are imported, and not for those of OMP_NUM_THREADS, which is applied late.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import IO

import pytest
import torch

from medvqa_rl.core.machine import own_cores

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "medvqa_rl.cli.app", "medvqa_rl.learning.grpo", "medvqa_rl.learning.sft"])


def _program(words: Sequence[str], env: Mapping[str, str], cwd: str, outputs: Sequence[str]) -> None:
    """Become the program ``python *words``."""
    for descriptor, path in enumerate(outputs, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    threads = int(env.get("OMP_NUM_THREADS", len(own_cores())))
    if threads > 1:
        # This makes torch's pool of threads, which a process that forks again must not have.
        torch.set_num_threads(threads)
    option, *rest = words
    folder = "" if option == "-c" else cwd if option == "-m" else str(Path(option).parent)
    sys.path[:0] = [folder, *env.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        if option == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif option == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(words)
            runpy.run_path(option, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()


class Popen:
    """A running Python program, whose output goes to the given files or to temporary ones."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        assert command[0] == sys.executable
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [
            file.name if file is not None else str(Path(self._folder.name, name))
            for name, file in (("stdout", stdout), ("stderr", stderr))
        ]
        environment = dict(os.environ if env is None else env)
        words = (list(command[1:]), environment, os.fspath(cwd or Path.cwd()), self._outputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()
        self._process = _SERVER.Process(target=_program, args=words, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"{self._process.name} ran for more than {timeout} s.")
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return what was written to standard output and error."""
        self.wait(timeout)
        out, err = (Path(path).read_text(encoding="utf-8") for path in self._outputs)
        return out, err


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    timeout: float | None = None,
    **captured: bool,
) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end; ``captured`` are the usual ``capture_output=True, text=True, check=False``."""
    assert captured == {"capture_output": True, "text": True, "check": False}
    process = Popen(command, env=env, cwd=cwd)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(command, process.wait(), out, err)
