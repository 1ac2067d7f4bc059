"""Which evaluations a report lists, and in which order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from synthetic import make_run, write_eval

from medvqa_rl.report.comparisons import accuracy_rows
from medvqa_rl.report.runs import read_run


def test_before_is_listed_in_front_of_after(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one")
    for name in ("after", "after_home", "after_unseen", "before", "before_home", "before_unseen", "other"):
        write_eval(folder / "eval" / name, [True, False])
    run = read_run(folder)
    expected = ["step 0", "step 40"]
    expected += ["before", "after", "before_home", "after_home", "before_unseen", "after_unseen", "other"]
    assert [name.partition(" (")[0] for _, name, _ in accuracy_rows([run])] == expected
    backwards = replace(run, evaluations=run.evaluations[::-1])
    assert [name.partition(" (")[0] for _, name, _ in accuracy_rows([backwards])][2:] == expected[2:]
