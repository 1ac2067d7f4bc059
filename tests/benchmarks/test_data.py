"""The data benchmark runs; its limits are meant for 200,000 rows on an idle machine.

Run: pytest tests/benchmarks/test_data.py
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_on_a_small_table() -> None:
    command = [sys.executable, "-m", "benchmarks.data", "--rows", "300", "--images", "16"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    for part in (
        "table of 300 rows",
        "first load",
        "second load",
        "peak",
        "no prefetching",
        "prompts/s in training",
        "in evaluation, memory grew by",
    ):
        assert part in result.stdout
