"""Run documented commands one after the other, in one process and in the working directory; a script.

    python documented.py STEPS.json

Prints a line of JSON for each step: its exit code, the seconds it took and what it printed.
"""

from __future__ import annotations

import contextlib
import glob
import io
import json
import sys
import time
import traceback
from pathlib import Path


def run(step: list[str]) -> int:
    """Run the words of a command, or the code of a Python block."""
    from medvqa_rl.cli.app import app

    if step[0] == "python":
        exec(compile(step[1], "block", "exec"), {})
        return 0
    words = [match for word in step[1:] for match in (sorted(glob.glob(word)) if "*" in word else [word])]
    try:
        app(words, prog_name="medvqa-rl")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def main() -> None:
    """Run all steps, whatever becomes of the others."""
    for step in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        began, printed = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = run(step)
            except Exception:  # noqa: BLE001, a defect in one step is that step's result
                traceback.print_exc()
                code = -1
        seconds = round(time.perf_counter() - began, 2)
        print(json.dumps({"step": step, "code": code, "seconds": seconds, "printed": printed.getvalue()}), flush=True)


if __name__ == "__main__":
    main()
