"""Signals stop a run after its current step: Ctrl-C, SIGTERM and the SIGHUP of a closed terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
from pathlib import Path

import pytest
from toy import toy_config

from medvqa_rl.learning.run.signals import StopSignals
from tests import forking

TOY = Path(__file__).parents[1] / "toy.py"
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(autouse=True)
def without_nohup():
    """These tests must not depend on how pytest was started."""
    before = signal.signal(HUP, signal.SIG_DFL)
    yield
    signal.signal(HUP, before)


@pytest.mark.parametrize(
    ("sent", "number", "is_raised"),
    [
        ([INT], INT, False),
        ([HUP, HUP], HUP, False),  # the kernel and the shell both send it
        ([TERM, HUP], TERM, False),  # as systemd does
        ([HUP, TERM], TERM, False),
        ([INT, INT], INT, True),
        ([HUP, TERM, INT], TERM, True),
    ],
)
def test_a_second_request_stops_at_once_but_a_hangup_never_does(sent, number, is_raised):
    before = [signal.getsignal(one) for one in (INT, TERM, HUP)]
    raised = False
    with StopSignals(speaks=False) as signals:
        try:
            for one in sent:
                os.kill(os.getpid(), one)
        except KeyboardInterrupt:
            raised = True
    assert (signals.number, raised) == (number, is_raised)
    assert [signal.getsignal(one) for one in (INT, TERM, HUP)] == before


def test_nohup_is_respected():
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with StopSignals(speaks=False) as signals:
            os.kill(os.getpid(), HUP)
        assert not signals.number and signal.getsignal(HUP) == signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


ON_A_TERMINAL = """
import os, runpy, signal, sys

signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.login_tty(os.open(sys.argv[1], os.O_RDWR))
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A program that runs another one as the leader of a session on the terminal that is its first argument."""


@pytest.mark.slow
def test_closing_the_terminal_saves_the_step(tiny_folder, tmp_path):
    """On a real terminal, which cannot be written to once it is gone."""
    config = toy_config(tiny_folder("qwen2_vl"), tmp_path / "run", train={"steps": 100_000, "eval_steps": 0})
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    terminal, its_end = pty.openpty()
    child = forking.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, os.ttyname(its_end), str(TOY), "train", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seen = b""
    while b"Step 2:" not in seen:  # the table of samples, which comes after the metrics
        seen += os.read(terminal, 4096)
    os.close(its_end)
    os.close(terminal)  # the kernel sends SIGHUP
    assert child.wait(timeout=60) == 128 + HUP
    state = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (state["state"], state["reason"]) == ("stopped", "SIGHUP")
    assert (tmp_path / "run" / "checkpoints" / f"step_{state['step']:06d}" / "trainer" / "state.json").exists()
    assert f"Stopped after step {state['step']} as requested" in (tmp_path / "run" / "train.log").read_text()
