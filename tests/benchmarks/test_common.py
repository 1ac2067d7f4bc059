"""Benchmarks report the load of the machine, and when it makes their numbers worthless.

Run: pytest tests/benchmarks/test_common.py
"""

from __future__ import annotations

from typing import Literal

import pytest

from benchmarks.common import describe_load, load_line
from medvqa_rl.core.machine import Load


class Meter:
    def read(self) -> Load:
        return Load(4, 1.2345)


def test_the_load_is_measured_and_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (3.456, 2.0, 1.0))
    found = describe_load(Meter())  # type: ignore[arg-type]
    assert found == {"load": 3.46, "cores": 4, "busy": 1.23}
    assert load_line(found | {"threads": 1}, "wall") == "load 3.46, other processes kept 1.23 of 4 cores busy"


@pytest.mark.parametrize(
    ("threads", "busy", "clock", "is_worthless"),
    [
        (1, 0.0, "wall", False),
        (4, 0.05, "wall", False),
        (4, 0.2, "wall", True),
        (2, 1.9, "wall", False),  # on the other two cores
        (2, 2.2, "wall", True),
        (8, 0.0, "wall", False),
        (1, 4.0, "processor", False),
    ],
)
def test_shared_cores_make_wall_times_worthless(
    threads: int, busy: float, clock: Literal["wall", "processor"], is_worthless: bool
) -> None:
    line = load_line({"load": 1.0, "cores": 4, "busy": busy, "threads": threads}, clock)
    assert ("\nWORTHLESS: these are wall times" in line) == is_worthless
