"""The number of CPU threads follows the load, the model and a resumed run; waiting threads sleep on busy cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from threading import Event

import psutil
import pytest
import torch

from medvqa_rl.core import machine
from medvqa_rl.core.embedded import checkpoint_bytes
from medvqa_rl.core.machine import (
    SHARE,
    Load,
    LoadMeter,
    ProcessLock,
    choose_threads,
    claimed,
    describe,
    is_set,
    own_share,
    recorded_threads,
)

SMALL, LARGE = 3_000_000, 4_000_000_000


@pytest.mark.parametrize(
    ("load", "share", "settings", "count"),
    [
        (Load(2, 0.0), 2, {}, 2),
        (Load(2, 0.3), 2, {}, 2),
        (Load(2, 0.5), 2, {}, 1),
        (Load(2, 1.0), 2, {}, 1),
        (Load(2, 2.0), 2, {}, 1),
        (Load(1, 0.0), 1, {}, 1),
        (Load(8, 3.0), 8, {}, 5),
        (Load(8, 3.7), 8, {}, 4),
        (Load(8, 0.0), 8, {"num_bytes": LARGE}, 8),
        (Load(8, 0.0), 8, {"num_bytes": SMALL}, 4),
        (Load(8, 6.0), 8, {"num_bytes": SMALL}, 2),
        (Load(8, 0.0), 3, {}, 3),
        (Load(8, 7.0), 3, {}, 1),
        (Load(2, 2.0), 2, {"before": 2}, 2),  # a resumed run keeps its number whatever the load
        (Load(8, 0.0), 8, {"before": 1, "num_bytes": LARGE}, 1),
        (Load(8, 0.0), 2, {"before": 6, "num_bytes": SMALL}, 6),
        (Load(2, 0.0), 2, {"before": 64}, 2),  # there are no 64 cores here
    ],
)
def test_threads_get_free_cores(load, share, settings, count):
    assert choose_threads(load, share, **settings) == count


def test_the_sentence_names_the_number_and_the_load():
    assert describe(1, Load(2, 1.04), is_kept=False) == (
        "Using 1 CPU thread: other processes keep 1.0 of 2 cores busy (set OMP_NUM_THREADS to use another number)."
    )
    assert describe(2, Load(1, 0.0), is_kept=True) == (
        "Using 2 CPU threads: other processes keep 0.0 of 1 core busy (it was started with as many)."
    )


def test_processes_side_by_side_get_equal_shares(monkeypatch):
    monkeypatch.delenv(SHARE, raising=False)
    monkeypatch.setattr("medvqa_rl.core.machine.own_cores", lambda: range(8))
    monkeypatch.setattr("medvqa_rl.core.machine.psutil.cpu_count", lambda logical: 6)
    assert [own_share(count) for count in (1, 2, 4, 100)] == [6, 3, 1, 1]
    monkeypatch.setattr("medvqa_rl.core.machine.psutil.cpu_count", lambda logical: None)  # unknown in some containers
    assert own_share(2) == 4
    monkeypatch.setenv(SHARE, "3")
    assert own_share(2) == 3


def test_the_meter_counts_other_processes_only(monkeypatch):
    """On simulated clocks: 10 s on two cores, which are busy for 15 s, 3 s of them with this process."""
    clocks = {"wall": 100.0, "busy": 50.0, "own": 7.0}
    monkeypatch.setattr("medvqa_rl.core.machine.time.perf_counter", lambda: clocks["wall"])
    monkeypatch.setattr("medvqa_rl.core.machine._busy_seconds", lambda cores: clocks["busy"])
    monkeypatch.setattr("medvqa_rl.core.machine._own_seconds", lambda: clocks["own"])
    monkeypatch.setattr("medvqa_rl.core.machine.own_cores", lambda: (0, 1))
    meter = LoadMeter()
    clocks.update(wall=110.0, busy=65.0, own=10.0)
    assert meter.read() == Load(2, pytest.approx(1.2))


def test_busy_seconds_are_those_of_the_own_cores(monkeypatch):
    """As psutil reports them; a guest's seconds are also in user."""
    monkeypatch.setattr("medvqa_rl.core.machine.sys.platform", "linux")
    names = "user nice system idle iowait irq softirq steal guest guest_nice"
    core = namedtuple("core", names)
    times = [core(100, 0, 10, 500, 5, 1, 2, 3, 40, 0), core(7, 1, 2, 900, 0, 0, 0, 0, 0, 0)]
    monkeypatch.setattr("medvqa_rl.core.machine.psutil.cpu_times", lambda percpu: times)
    assert machine._busy_seconds([0]) == 116 and machine._busy_seconds([1]) == 10
    assert machine._busy_seconds([0, 1]) == 126
    assert machine._busy_seconds([34, 35]) == 126  # the same two under the numbers of the host
    times[:] = [core(*[0] * 10)] * 2
    assert machine._busy_seconds([0, 1]) == 0


def test_the_meter_does_not_count_this_process():
    """The clocks are the machine's: what this process computes is no other process's."""
    meter, before = LoadMeter(), time.process_time()
    while time.process_time() - before < 0.3:
        pass
    began = time.perf_counter()
    idle_machine = LoadMeter()
    time.sleep(0.3)
    assert time.perf_counter() > began
    assert meter.read().busy <= idle_machine.read().busy + 0.9  # the one busy core would add 1


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_user_may_set_the_number(monkeypatch, name):
    for other in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(other, raising=False)
    assert not is_set()
    monkeypatch.setenv(name, "1")
    assert is_set()


def test_the_number_of_a_run_is_read_from_its_newest_record(tmp_path):
    files = [tmp_path / name for name in ("missing.json", "old.json", "new.json")]
    assert recorded_threads(files) is None
    files[2].write_text(json.dumps({"threads": 3}))
    files[1].write_text(json.dumps({"threads": 2}))
    os.utime(files[1], (1, 1))
    assert recorded_threads(files) == 3
    files[2].write_text(json.dumps({"weights": "written before threads were recorded"}))
    assert recorded_threads(files) is None
    files[2].write_text('{"threads": "many"}')
    with pytest.raises(ValueError, match=r"new\.json has 'many' under threads .*: restore the file"):
        recorded_threads(files)


def test_the_size_of_a_checkpoint_is_that_of_its_weights(tmp_path):
    assert checkpoint_bytes(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}")
    for index in range(2):
        (tmp_path / f"model-{index}.safetensors").write_bytes(b"1234567")
    assert checkpoint_bytes(str(tmp_path)) == 14
    assert checkpoint_bytes("phantom:instruct") < 10_000_000
    assert checkpoint_bytes("owner/a-model-that-is-not-here") is None


def test_threads_sleep_only_while_others_need_the_cores(monkeypatch):
    """Two threads on two cores: a neighbour comes, stays, and leaves."""
    loads = iter([0.1, 0.4, 0.7, 1.0, 0.6, 0.1, 0.0, 0.9])
    events: list[Event] = []
    seen: list[list[bool]] = []

    class Meter:
        def read(self) -> Load:
            seen.append([event.is_set() for event in events])
            return Load(2, next(loads))

    def add(count: int) -> Event:
        assert count == 2
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(machine, "LoadMeter", Meter)
    monkeypatch.setattr(machine, "_add_idle_threads", add)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(StopIteration):
        machine._watch(0.0)
    assert seen == [[], [], [], [False], [False], [False], [True], [True], [True, False]]


def test_one_thread_has_nobody_to_wait_for(monkeypatch):
    """The watch ends at once, before it measures the load."""
    measured = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(machine, "LoadMeter", lambda *args, **kwargs: measured.append(args))
    monkeypatch.setattr(machine.time, "sleep", measured.append)
    machine._watch(0.0)
    assert measured == []


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is the OpenMP of torch on Linux")
def test_idle_threads_exceed_the_cores_and_go_away():
    """In a process of its own, because this one may compute on one thread."""
    code = """
import os, time
import torch
from medvqa_rl.core import machine

def count():
    return len(os.listdir("/proc/self/task"))

torch.ones(2**20).sum()
before = count()
release = machine._add_idle_threads(2)
end = time.perf_counter() + 10
while count() <= before + 1 and time.perf_counter() < end:
    time.sleep(0.01)
print(count() - before)
release.set()
while count() > before and time.perf_counter() < end:
    time.sleep(0.01)
print(count() - before)
"""
    cores = len(machine.own_cores())
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    added, left = map(int, process.stdout.split())
    # Each helper adds itself and one OpenMP thread; with the two that torch has they exceed the cores.
    assert left == 0 and 2 + added / 2 > cores


CHILD = (
    "from medvqa_rl.core.machine import end_with_parent; import time; end_with_parent(seconds=0.05); time.sleep(60)"
)
STARTER = """
import os, subprocess, sys, time
from medvqa_rl.core.machine import PARENT
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {PARENT: str(os.getpid())})
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_killed_process_ends_those_that_it_started():
    starter = subprocess.Popen([sys.executable, "-c", STARTER, CHILD], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    child = psutil.Process(int(starter.stdout.readline()))
    assert child.is_running()
    starter.kill()
    starter.wait()
    child.wait(timeout=10)  # raises if it is still running
    starter.stdout.close()


HOLD = """
import sys
from pathlib import Path
from medvqa_rl.core.machine import ProcessLock
lock = ProcessLock(Path(sys.argv[1]))
lock.acquire("has it.")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        lock = ProcessLock(path)
        with pytest.raises(ValueError, match=f"^Process {other.pid} is here: go away\\.$"):
            lock.acquire("is here: go away.")
        other.kill()
    lock.acquire("is here: go away.")
    assert lock.holder.read_text().split()[0] == str(os.getpid())
    lock.release()
    assert [file.name for file in path.parent.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("content", "name"),
    [("12 far-away", "Process 12 on far-away"), ("", "Another process"), ("x\x1b[2J y", "Another process")],
)
def test_the_holder_is_named_as_far_as_it_is_known(tmp_path: Path, content: str, name: str) -> None:
    first, second = ProcessLock(tmp_path / "x"), ProcessLock(tmp_path / "x")
    first.acquire("")
    first.holder.write_text(content)
    with pytest.raises(ValueError, match=f"^{name} has it\\.$"):
        second.acquire("has it.")
    first.release()


def test_an_output_is_claimed_once_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "data.csv"
    message = f"^Process {os.getpid()} is writing .*data.csv: wait"
    with claimed(path), pytest.raises(ValueError, match=message), claimed(path):
        pytest.fail("two claims")
    assert not list(tmp_path.iterdir())
    with claimed(path):
        path.touch()
    assert list(path.parent.iterdir()) == [path]
