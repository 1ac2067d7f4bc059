"""The verbs eval, ask and env, end to end on tiny random models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from medvqa_rl import __version__
from medvqa_rl.cli.app import app, installed_extras
from medvqa_rl.cli.ask import make_question, read_vote
from medvqa_rl.config import Config, EvalConfig, LoraConfig, ModelConfig, RolloutConfig
from medvqa_rl.core.types import Completion, Sample
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.evaluation import cells as eval_command
from medvqa_rl.evaluation.cells import run_eval
from medvqa_rl.models.checkpoints import model_for, with_checkpoint, write_model
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


def test_a_runs_folder_is_no_checkpoint_but_its_best_one_is_named(tmp_path: Path) -> None:
    for name in ("checkpoints/step_000100", "best", ".best.tmp"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    with pytest.raises(ValueError, match=f"holds neither .*: try {tmp_path / 'best'}"):
        with_checkpoint(ModelConfig(), tmp_path)
    with pytest.raises(ValueError, match="does not exist: give the folder"):
        with_checkpoint(ModelConfig(), tmp_path / "none")


def test_ask_names_the_models_in_a_runs_folder(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds neither config.json nor adapter_config.json: try .*best\.$"):
        model_for(str(tmp_path))


def test_an_adapter_brings_its_base_model(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text('{"base_model_name_or_path": "some/model"}')
    assert model_for(str(tmp_path)) == ModelConfig(path="some/model", adapter=str(tmp_path))
    assert model_for("some/model") == ModelConfig(path="some/model")
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not name the model it was trained on"):
        model_for(str(tmp_path))


def test_votes(make_sample: MakeSample) -> None:
    choice, free = make_sample(options=("left lung", "right lung")), make_sample()

    def vote(sample: Sample, answer: str) -> str:
        return read_vote(sample, Completion((), f"<think>x</think><answer>{answer}</answer>", False), "think_answer")

    assert vote(choice, "b.") == vote(choice, "right lung") == "B: right lung"
    assert vote(choice, "C") == vote(choice, "") == "(no answer)"
    assert vote(free, "The Liver.") == vote(free, "liver") == "liver"


def test_ask_greedily_and_as_a_group(
    tiny_folder: MakeFolder, tmp_path: Path, make_image: Callable[..., object]
) -> None:
    image = tmp_path / "x.png"
    make_image().load().save(image)  # type: ignore[attr-defined]
    model = str(tiny_folder("qwen2_vl"))
    arguments = ["ask", str(image), "Where?", "--model", model, "--max-length", "6"]
    greedy = CliRunner().invoke(app, arguments)
    assert greedy.exit_code == 0, greedy.output
    assert "never use it for a decision" in greedy.output
    first, again, other = (
        CliRunner().invoke(app, [*arguments, "--samples", "4", "--seed", seed]).output for seed in ("0", "0", "1")
    )
    assert first == again != other
    assert "of 4" in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png", "Where?"], "The image none.png does not exist: give the path of an image file"),
        ([".", "Where?"], "The image . is a folder"),
        (["x.png", " "], "The question is empty"),
        (["x.png", "Where?", "--option", "left"], "There are 1 options, but a choice question needs 2 to 26"),
    ],
)
def test_ask_says_what_is_wrong_before_it_loads_a_model(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 30)).save("x.png")
    result = CliRunner().invoke(app, ["ask", *arguments, "--model", "nowhere"])
    assert result.exit_code == 2
    assert message in result.output


def test_a_question_does_not_know_its_answer(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png")
    assert make_question(tmp_path / "x.png", "Where?", ("left", "right")).answer_type == "choice"
    assert make_question(tmp_path / "x.png", "Where?", ()).answer == ""


def test_env_prints_versions_and_extras() -> None:
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    assert f"medvqa-rl {__version__}" in " ".join(result.output.split())
    for name in ("torch", "threads", "GiB", "extras"):
        assert name in result.output
    assert set(installed_extras()) >= {"bench", "dev", "hub", "track", "vllm"}
