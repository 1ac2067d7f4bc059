"""The verb eval, end to end on tiny random models.

Run: pytest tests/cli/test_evaluate.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medvqa_rl.config import Config, EvalConfig, LoraConfig, ModelConfig, RolloutConfig
from medvqa_rl.core.types import Sample
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.evaluation import cells as eval_command
from medvqa_rl.evaluation.cells import run_eval
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import RolloutEngine

MakeFolder = Callable[[str], Path]
MakePolicy = Callable[..., Policy]
MakeSample = Callable[..., Sample]


@pytest.fixture
def config(tiny_folder: MakeFolder, tmp_path: Path) -> Config:
    return Config(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_folder("qwen2_vl")), device="cpu"),
        rollout=RolloutConfig(max_completion_length=6),
        eval=EvalConfig(batch_size=2, bootstrap=50),
    )


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch, make_sample: MakeSample) -> StoredDataset:
    """Three questions in the place of the data set that settings name."""
    data = StoredDataset("three", tuple(make_sample(f"q{index}") for index in range(3)))
    monkeypatch.setattr(eval_command, "load_dataset", lambda config, split: data)
    return data


def outputs(folder: Path) -> list[str]:
    return [json.loads(line)["output"] for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_eval_writes_what_the_engine_answers(
    config: Config,
    questions: StoredDataset,
    tiny_policy: MakePolicy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_eval(config, checkpoint=None, split="test", output=tmp_path / "out", dry_run=False)
    engine = RolloutEngine(tiny_policy(), "think_answer")
    groups = engine.greedy(questions.samples, max_completion_length=6, batch_size=3)
    assert outputs(tmp_path / "out") == [group.completions[0].text for group in groups]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n"] == 3 and results["settings"]["max_completion_length"] == 6
    shown = capsys.readouterr()
    assert "accuracy" in shown.out and str(tmp_path / "out") in shown.out.replace("\n", "")
    assert "questions" not in shown.err  # no bar where the output is not a terminal


def test_eval_uses_the_weights_of_a_checkpoint_whole_or_adapter(
    config: Config, questions: StoredDataset, tiny_policy: MakePolicy, tmp_path: Path
) -> None:
    whole, adapter = tiny_policy(seed=1), tiny_policy(lora=LoraConfig(rank=2))
    for name, parameter in adapter.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.2)
    for name, policy in (("whole", whole), ("adapter", adapter)):
        write_model(policy, tmp_path / name)
        run_eval(config, checkpoint=tmp_path / name, split="val", output=None, dry_run=False)
        groups = RolloutEngine(policy, "think_answer").greedy(questions.samples, max_completion_length=6, batch_size=3)
        expected = [group.completions[0].text for group in groups]
        assert outputs(Path(config.output_dir) / "eval" / f"three-{name}") == expected


def test_eval_refuses_a_folder_in_use_before_it_loads_a_model(
    config: Config, questions: StoredDataset, tmp_path: Path
) -> None:
    config = config.model_copy(update={"model": ModelConfig(path="/nowhere")})
    (tmp_path / "results.json").touch()
    with pytest.raises(ValueError, match="already holds an evaluation: choose another with --output"):
        run_eval(config, checkpoint=None, split="test", output=tmp_path, dry_run=False)


def test_dry_run_of_eval_writes_nothing(
    config: Config, questions: StoredDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_eval(config, checkpoint=None, split="test", output=tmp_path / "out", dry_run=True)
    assert "batch: 2 prompts of " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
