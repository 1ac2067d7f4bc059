"""TensorBoard, the terminal, the table of completions, and the recorded environment."""

from __future__ import annotations

import io
import json
import shlex
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from toy import ToyData, read_metrics, toy_config

from medvqa_rl.core import progress
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run import logger, validation
from medvqa_rl.learning.run import run as run_module
from medvqa_rl.learning.run.logger import RunLogger, completions_table, group_to_show
from medvqa_rl.learning.run.run_dir import RunDir, source_digest
from medvqa_rl.learning.run.step_metrics import CompletionRecord


def test_tensorboard_receives_the_metrics(tiny_folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = {"steps": 3, "logging_steps": 2, "trackers": ["tensorboard"], "eval_steps": 3}
    config = toy_config(tiny_folder("qwen2_vl"), tmp_path / "run", train=changes)
    run = train(config, train_set=ToyData(), val_set=ToyData(2))
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rewards = {event.step: event.value for event in events.Scalars("reward")}
    logged = {line["step"]: line["reward"] for line in read_metrics(run) if "reward" in line}
    assert set(rewards) == {2, 3} and set(logged) == {1, 2, 3}  # metrics.jsonl keeps every step
    assert all(rewards[step] == pytest.approx(logged[step]) for step in rewards)
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, 3]


def test_a_run_begins_with_what_is_trained_and_ends_with_the_next_commands(tiny_folder, tmp_path, monkeypatch, capsys):
    exact = validation.validate

    def slow(*arguments, progress, **rest):
        progress(1, 3)
        time.sleep(0.1)
        return exact(*arguments, progress=progress, **rest)

    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    monkeypatch.setattr(run_module, "validate", slow)
    changes = {"steps": 2, "eval_steps": 2, "save_steps": 0}
    run = train(
        toy_config(tiny_folder("qwen2_vl"), tmp_path / "my run", train=changes),
        train_set=ToyData(),
        val_set=ToyData(3),
    )
    lines = capsys.readouterr().err.splitlines()
    first = lines.index(f"Loaded {tiny_folder('qwen2_vl')} (float32, cpu): 102,208 parameters.")
    assert lines[first + 1].endswith("%): all weights of the language model, the projector.")
    assert "evaluating 1/3 questions, 0 s" in lines[first + 2 :]
    commands = [shlex.split(line[line.index("medvqa-rl") :]) for line in lines if line.startswith("  ")]
    assert commands == [
        ["medvqa-rl", "eval", str(run)],
        ["medvqa-rl", "report", str(run)],
        ["medvqa-rl", "train", str(run / "config.yaml"), "--resume", "train.steps=4"],
    ]


def test_plain_lines_without_a_terminal(tiny_folder, tmp_path, capsys):
    config = toy_config(tiny_folder("qwen2_vl"), tmp_path / "run", train={"steps": 4, "logging_steps": 2})
    train(config, train_set=ToyData())
    shown = capsys.readouterr().err
    assert "step 2/4" in shown and "step 4/4" in shown and "step 1/4" not in shown
    assert "s/step" in shown and "left" in shown
    assert "\r" not in shown and "\x1b[" not in shown and "━━━━━━━━━━ " not in shown


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_time_left_follows_the_step_time(tmp_path, monkeypatch, capsys, is_terminal):
    """It excludes the evaluation before the first step, and works for steps longer than rich's speed window."""
    now = [0.0]
    monkeypatch.setattr(logger, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    config = toy_config(tmp_path, tmp_path, train={"steps": 4})
    with RunLogger(RunDir(tmp_path), config, first_step=0) as tracker:
        now[0] = 1000.0
        tracker.log(0, {"eval/accuracy": 0.5})
        now[0] = 1050.0
        tracker.log(1, {"reward": 1.25, "loss": 0.5})
        tracker.show_evaluation_progress(3, 9)
        tracker.log(1, {"eval/accuracy": 0.75})
    shown = capsys.readouterr().err
    assert "50.00 s/step, 2 min left" in shown
    if is_terminal:
        assert "reward 1.250  50.00 s/step, 2 min left" in shown.splitlines()[-2]  # not "evaluating", which is over


def record(index: int, text: str, reward: float, advantage: float) -> CompletionRecord:
    """A completion with these rewards."""
    return CompletionRecord(
        sample_id="s",
        index=index,
        question="Which [bold]side?",
        options=("left", "right"),
        gold="B",
        completion=text,
        rewards={"format": 1.0, "correctness": reward},
        reward=reward + 1,
        advantage=advantage,
        length=7,
        prompt_length=3,
        is_truncated=index == 0,
        is_correct=reward == 1.0,
        has_answer=True,
        answer_type="choice",
        groups={"modality": "CT"},
        extra={},
    )


def test_a_group_with_signal_is_shown():
    dull = [record(index, "dull", 1.0, 0.0) for index in range(2)]
    telling = [record(0, "wrong", 0.0, -0.5), record(1, "right", 1.0, 0.5)]
    assert group_to_show([*dull, *telling, *dull], 2) == telling  # all of one sample: epochs can meet in a step
    assert group_to_show([*dull, *dull], 2) == dull


def test_table_of_completions():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(completions_table(5, [record(0, "worse", 0.0, -0.7), record(1, "[red]better", 1.0, 0.7)]))
    lines = console.export_text().splitlines()
    assert "Step 5: Which [bold]side?  A: left  B: right  [gold: B]" in lines[0]
    better, worse = (next(i for i, line in enumerate(lines) if word in line) for word in ("[red]better", "worse"))
    assert better < worse and "+0.70" in lines[better] and "7…" in lines[worse]


def test_the_source_digest_covers_names_and_contents_of_python_files(tmp_path):
    (tmp_path / "inner").mkdir()
    file, other = tmp_path / "a.py", tmp_path / "inner" / "b.py"
    found = []
    for text, name in (("x = 1", "y"), ("x = 2", "y"), ("x = 2", "z")):
        file.write_text(text)
        other.write_text(name)
        found.append(source_digest(tmp_path))
    other.rename(tmp_path / "b.py")
    found.append(source_digest(tmp_path))
    assert len(set(found)) == 4
    (tmp_path / "notes.txt").write_text("no source")
    assert source_digest(tmp_path) == found[-1]


def test_environment_changes_are_reported_on_resume(tiny_folder, tmp_path):
    config = toy_config(tiny_folder("qwen2_vl"), tmp_path / "run", train={"steps": 1})
    run = train(config, train_set=ToyData())
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(environment | {"threads": 64, "source": "another"}))
    train(toy_config(tiny_folder("qwen2_vl"), run, train={"steps": 2}), train_set=ToyData(), resume=True)
    log = (run / "train.log").read_text()
    assert f"threads (64 -> {environment['threads']})" in log and "packages" not in log
    assert f"source (another -> {environment['source']})" in log
    assert (run / "env.resumed_000001.json").exists()
