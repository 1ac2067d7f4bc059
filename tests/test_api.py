"""The Python interface: it computes what the command line computes, and leaves the program around it alone."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import medvqa_rl
from medvqa_rl import Config, Evaluation, MedVQAError, Run, evaluate, load_dataset, sft, train
from medvqa_rl.cli.app import app
from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.core.files import list_checkpoints
from medvqa_rl.core.types import Sample
from medvqa_rl.learning.run.resume import read_resumes

SMALL: dict[str, Any] = {
    **{"steps": 3, "prompts_per_step": 2, "prompts_per_micro_batch": 2, "num_generations": 3},
    **{"max_completion_length": 24, "learning_rate": 1e-3, "self_check": False, "bootstrap": 20},
}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def questions(count: int, *, first: int = 0) -> list[Sample]:
    dataset = load_dataset("phantom", split="val")
    return [dataset[index] for index in range(first, first + count)]


def settings(**given: Any) -> Config:
    return Config.from_settings(**{**SMALL, **given})


def weights(folder: str | Path) -> bytes:
    return (list_checkpoints(Path(folder))[-1] / "model.safetensors").read_bytes()


def command(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def brief(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [1.0 if len(ids) < 18 else 0.0 for ids in completion_ids]


@contextmanager
def nothing_changes() -> Iterator[None]:
    """The working folder, the handlers of signals and of logs, the modules' veto and the streams stay as they are."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def state() -> Any:
        root = logging.getLogger()
        handlers = [signal.getsignal(number) for number in numbers]
        return os.getcwd(), handlers, list(root.handlers), root.level, "kernels" in sys.modules, sys.stdout, sys.stderr

    before = state()
    yield
    assert state() == before


def test_importing_is_light_and_quick() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import medvqa_rl; seconds = time.perf_counter() - began\n"
        "light = not sys.modules.keys() & {'torch', 'numpy', 'pydantic', 'typer'}\n"
        "from medvqa_rl import Config, Evaluation, MedVQAError, Run, Sample, evaluate, load_dataset, sft, train\n"
        "print(seconds < 0.2, light, 'torch' in sys.modules, sorted(medvqa_rl.__all__) == medvqa_rl.__all__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False", "True"], done.stderr
    assert len(medvqa_rl.__all__) == 10 and set(medvqa_rl.__all__) <= set(dir(medvqa_rl))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        medvqa_rl.trian  # noqa: B018


def test_training_equals_the_command_line_bit_for_bit(tmp_path: Path) -> None:
    """From a thread with a running event loop, as in a notebook."""
    results: list[Run] = []

    async def cell() -> None:
        results.append(train("phantom:instruct", ["correctness", "format"], settings(output_dir="a"), questions(6)))

    with nothing_changes():
        thread = threading.Thread(target=asyncio.run, args=[cell()])
        thread.start()
        thread.join()
    (run,) = results
    command("train", "a/config.yaml", "output_dir=b")  # the same data, from the folder of the first
    assert weights("a") == weights("b")
    assert (run.state, run.step, len(run.metrics)) == ("finished", 3, 3)
    assert [row["reward"] for row in run.metrics] == [row["reward"] for row in Run("b").metrics]
    assert {"correctness", "format"} == {name for name, weight in run.config.rewards.weights.items() if weight}


def test_training_on_the_configured_data_equals_the_command_line(tmp_path: Path) -> None:
    config = settings(output_dir="a", steps=1)
    Path("given.yaml").write_text(write_yaml(config.model_dump(mode="json", exclude_defaults=True)))
    train(config=config)
    command("train", "given.yaml", "output_dir=b")
    assert weights("a") == weights("b")


def test_an_interrupted_run_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    """Ctrl-C in step 2 saves a checkpoint and then interrupts the program."""
    whole = train("phantom:instruct", ["correctness", brief], settings(output_dir="a"), questions(6))
    calls = []

    def interrupting() -> Any:
        source = brief

        def brief_(completion_ids: Any, **kwargs: Any) -> list[float]:
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return source(completion_ids)

        brief_.__name__ = "brief"
        return brief_

    function = interrupting()
    with nothing_changes(), pytest.raises(KeyboardInterrupt):
        train("phantom:instruct", ["correctness", function], settings(output_dir="b"), questions(6))
    assert (Run("b").state, Run("b").step) == ("stopped", 2)
    resumed = train("phantom:instruct", ["correctness", function], settings(output_dir="b"), resume=True)
    assert resumed.state == "finished" and len(calls) == 3
    assert weights("a") == weights("b") and len(whole.metrics) == len(resumed.metrics) == 3


def test_a_repaired_function_is_recorded(tmp_path: Path) -> None:
    train("phantom:instruct", ["correctness", brief], settings(output_dir="a", steps=1), questions(4))

    def repaired(completion_ids: Any, **kwargs: Any) -> list[float]:
        return [0.5 for _ in completion_ids]

    repaired.__name__ = "brief"
    train("phantom:instruct", ["correctness", repaired], settings(output_dir="a", steps=2), resume=True)
    (resume,) = read_resumes(Path("a/resumes.jsonl"))
    name = f"{brief.__module__}.brief"
    assert resume.functions.keys() == {name}
    assert f"From step 2 on, the reward function {name} has another source." in resume.promise


def test_what_differs_from_the_start_is_refused(tmp_path: Path) -> None:
    config = settings(output_dir="a", steps=1)
    train("phantom:instruct", ["correctness", brief], config, questions(4))
    longer = settings(output_dir="a", steps=2)
    with pytest.raises(MedVQAError, match="is not that of the run, which is stored in"):
        train("phantom:instruct", ["correctness", brief], longer, questions(5), resume=True)

    train(config=settings(output_dir="b", steps=1))
    with pytest.raises(MedVQAError, match="The run in b has no stored samples: resume it without train_dataset"):
        train(config=settings(output_dir="b", steps=2), train_dataset=questions(2), resume=True)
    assert not Path("b/data").exists()
    with pytest.raises(MedVQAError, match="already contains a run"):
        train(config=config, train_dataset=questions(4))
    assert Run("a").step == 1


def test_the_results_of_a_run(tmp_path: Path) -> None:
    config = settings(output_dir="a", steps=2, eval_steps=2, log_completions_steps=1, max_completion_length=48)
    with pytest.warns(UserWarning, match="1 of 2 images of the evaluation are also trained on"):
        run = train("phantom:instruct", brief, config, questions(4), questions(4, first=2), reward_weights=[0.5])
    assert run.config.rewards.functions == {f"{brief.__module__}.brief": 0.5}
    assert [row["step"] for row in run.evaluations] == [0.0, 2.0] and len(run.samples()) == 2 * len(run.samples(1))
    assert run.samples(2)[0]["rewards"].keys() == {"brief"}
    assert run.checkpoint == Path("a/best") and run.report() == Path("a/report.html")
    with nothing_changes(), pytest.warns(UserWarning, match="1 of 2 images"):
        evaluation = run.evaluate(questions(4, first=2))
    right = [row["is_correct"] for row in evaluation.samples()]
    assert evaluation.accuracy == sum(right) / 4 == evaluation.metrics["eval/accuracy"]
    low, high = evaluation.interval
    assert low is not None and high is not None and low <= evaluation.accuracy <= high
    assert evaluation.folder is not None and (evaluation.folder / "results.json").is_file()
    assert repr(evaluation).startswith(f"Evaluation(accuracy {evaluation.accuracy:.1%}, 95 % interval {low:.1%} to ")
    # The same as the command line's, from the stored questions.
    data = Path(evaluation.results["config"]["data"]["path"])
    command("eval", "a", f"data.path={data}", "data.num_test=null", "--output", "cli")
    assert (evaluation.folder / "samples.jsonl").read_bytes() == Path("cli/samples.jsonl").read_bytes()
    again = evaluate(run, questions(4, first=2), resume=True)
    assert again.results == evaluation.results
    with pytest.raises(MedVQAError, match="already holds an evaluation"):
        evaluate("a", questions(4, first=2))
    with pytest.raises(MedVQAError, match=r"has no test split .* Or give the questions as dataset\."):
        run.evaluate()


def test_a_moved_run_takes_its_data_along(tmp_path: Path) -> None:
    train("phantom:instruct", "correctness", settings(output_dir="a", steps=1), questions(4))
    Path("a").rename("moved")
    run = Run("moved")
    assert run.config.data.path == "moved/data" and run.config.output_dir == "moved"
    command("train", "moved/config.yaml", "--resume", "train.steps=2")
    assert Run("moved").step == 2
    command("eval", "moved", "--split", "train", "data.num_train=2")
    resumed = train("phantom:instruct", "correctness", settings(output_dir="moved", steps=3), resume=True)
    assert resumed.step == 3


def test_supervision_and_a_model_that_is_a_checkpoint(tmp_path: Path) -> None:
    run = sft("phantom:base", settings(output_dir="a", steps=1, **{"sft.batch_size": 2}), questions(4))
    assert run.status["kind"] == "sft" and "loss" in run.metrics[0]
    evaluation = evaluate(run.checkpoint, config=settings(output_dir="b", **{"eval.max_samples": 3}))
    assert isinstance(evaluation, Evaluation) and evaluation.folder is not None
    assert evaluation.folder.parent == Path("b/eval")
    assert len(evaluation.records) == 3 and evaluation.results["model"]["path"] == str(run.checkpoint)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"config": "missing.yaml"}, r"The configuration missing\.yaml does not exist"),
        ({"model": "nowhere", "config": Config(network="on")}, "model.path is 'nowhere'"),
        ({"model": 3}, "The model is a int, but must be a folder or a name"),
        ({"reward_funcs": "corectness"}, "There is no reward 'corectness': write a function or one of format, corr"),
        ({"reward_funcs": [lambda completions: [0.0]]}, r"does not take \*\*kwargs"),
        ({"reward_funcs": [brief, brief]}, "Two of reward_funcs are called"),
        ({"reward_funcs": [brief], "reward_weights": [1.0, 2.0]}, "There are 2 reward_weights for 1 reward"),
        ({"reward_weights": [1.0]}, "reward_weights is given without reward_funcs"),
        ({"reward_funcs": [brief], "reward_weights": [0.0]}, "All reward weights are 0"),
        ({"eval_dataset": []}, "eval_dataset is given without train_dataset"),
        ({"train_dataset": []}, "train_dataset is empty"),
        (
            {"train_dataset": [{"image": "gone.png", "question": "q", "answer": "yes"}]},
            "missing image: rows 1",
        ),
        ({"train_dataset": [1], "config": Config.from_settings(eval_steps=2)}, "there is no eval_dataset: give one"),
        (
            {"train_dataset": [1], "config": Config.from_settings(**{"data.name": "slake_en", "data.path": "x"})},
            "data.name is slake_en, and a train_dataset is given too",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_leaves_nothing(
    arguments: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with nothing_changes(), pytest.raises(MedVQAError, match=expected):
        train(**arguments)
    assert not Path("runs/run").exists()


def test_other_wrong_arguments_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(MedVQAError, match="There is no run in nowhere"):
        Run("nowhere")
    with pytest.raises(MedVQAError, match=r"data\.name is the text 'vqarad'"):
        load_dataset("vqarad")
    with pytest.raises(MedVQAError, match="The model is a NoneType"):
        evaluate(None)  # type: ignore[arg-type]
    with pytest.raises(MedVQAError, match="dataset is endless"):
        evaluate("phantom:instruct", load_dataset("phantom"))
    assert not Path("runs/run").exists()


def test_rewards_and_data_are_checked_with_the_other_settings(tmp_path: Path) -> None:
    """A length target above the default limit of tokens, and answers that are sets, which the phantom's are not."""
    (image,) = questions(1)[0].images
    rows = [{"image": image.load(), "question": "Which?", "answer": ["lung", "heart"]}]
    given = {"data.answers_as": "set", "rewards.open_correctness": "exact", "rewards.length_target": 290}
    config = settings(output_dir="a", steps=1, **{**given, "max_completion_length": 300})
    assert train("phantom:instruct", ["format", "ecr"], config, rows).step == 1
    with pytest.raises(MedVQAError, match=r"data\.answers_as is set, but data\.name is phantom"):
        train(config=settings(output_dir="b", **given))


def test_a_defect_keeps_its_type(tmp_path: Path) -> None:
    def defect(completions: Any, **kwargs: Any) -> list[float]:
        raise KeyError("defect")

    with nothing_changes(), pytest.raises(KeyError, match="defect"):
        train("phantom:instruct", [defect], settings(output_dir="a", steps=1), questions(2))


def test_accelerate_is_left_as_it_was(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    sft("phantom:base", settings(output_dir="a", steps=1, **{"sft.batch_size": 2}), questions(2))
    assert not AcceleratorState._shared_state and not PartialState._shared_state
    PartialState(cpu=True)
    sft("phantom:base", settings(output_dir="b", steps=1, **{"sft.batch_size": 2}), questions(2))
    assert PartialState._shared_state


def test_the_page_shows_the_first_lines_that_a_user_of_trl_writes() -> None:
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    block = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    assert "train(" in block and "reward_funcs" in block and "train_dataset" in block


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(tmp_path: Path) -> None:
    one_step = {"steps": 1, "prompts_per_micro_batch": 1}
    script = tmp_path / "script.py"
    script.write_text(
        "from medvqa_rl import Config, load_dataset, train\n"
        f"config = Config.from_settings(output_dir='two', **{SMALL | one_step})\n"
        "questions = list(load_dataset('phantom', split='val', num_val=6))\n"
        "print(train('phantom:instruct', ['correctness', 'format'], config, questions).state)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()  # DeepSpeed, where it is installed, adds its own
    assert lines.count("finished") == 2, done.stdout
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train("phantom:instruct", ["correctness", "format"], settings(output_dir="one", **one_step), questions(6))
    finally:
        torch.set_num_threads(threads)
    assert weights("one") == weights("two")
