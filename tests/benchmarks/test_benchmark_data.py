"""The benchmark of loading runs; its limits are for 200,000 rows on a quiet machine.

Run: pytest tests/benchmarks/test_benchmark_data.py
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_on_a_small_table() -> None:
    command = [sys.executable, "-m", "benchmarks.data", "--rows", "300", "--images", "4"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    for part in ("table of 300 rows", "first load", "second load", "peak", "images/s, memory grew by"):
        assert part in result.stdout
