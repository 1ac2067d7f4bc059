"""The loop: a golden run, invariance to micro-batches and ranks, inner rounds, failures and bad input."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from toy import ToyData, gradients, read_metrics, toy_config
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from medvqa_rl.learning import update as update_module
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.objective.losses.grpo import grpo_loss
from medvqa_rl.learning.run.errors import NonFiniteError, UnscoredError
from medvqa_rl.models.loading import load_policy
from medvqa_rl.report.health import check_health
from medvqa_rl.report.runs import read_run
from tests import forking

TOY = Path(__file__).with_name("toy.py")
GOLDEN = Path(__file__).parents[1] / "golden" / "grpo_toy.json"
GOLDEN_NAMES = ("reward", "loss", "kl", "entropy", "grad_norm", "learning_rate", "completions/mean_length")


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_vl")


def test_golden_run(folder, tmp_path):
    """Three steps as they were recorded, to 1 in 1000: rounding differs between processors and versions of torch.

    After an intended change, delete the file, run this test and give the reason in the commit message.
    """
    run = train(toy_config(folder, tmp_path / "run", train={"steps": 3}), train_set=ToyData())
    found = [{name: line[name] for name in GOLDEN_NAMES} for line in read_metrics(run)]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} was missing and is recorded anew: look at it and run again.")
    for line, expected in zip(found, json.loads(GOLDEN.read_text()), strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_run_folder_is_complete(folder, tmp_path):
    measures = {"similarity": "tfidf", "perplexity_model": str(write_language_model(tmp_path, folder))}
    config = toy_config(
        folder,
        tmp_path / "run",
        train={"steps": 4, "eval_steps": 2, "save_steps": 1},
        eval={"bootstrap": 20, **measures},
    )
    run = train(config, train_set=ToyData(), val_set=ToyData(3), given={"train": {"steps": 4}})
    assert (run / "config.yaml").read_text() == "train:\n  steps: 4\n"
    assert json.loads((run / "config.resolved.json").read_text()) == config.model_dump(mode="json")
    assert json.loads((run / "data.json").read_text())["train"]["fingerprint"] == "toy-1"
    environment = json.loads((run / "env.json").read_text())
    # A wheel of torch may leave out its build, such as +cu130, in the version of the package.
    assert environment["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["cuda"] == torch.version.cuda and environment["seed"] == 0
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("finished", 4, 4)
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 2, 3, 4, 4]
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["step_000000", "step_000002", "step_000004"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000003", "step_000004"]
    samples = [json.loads(line) for line in (run / "samples" / "step_000002.jsonl").read_text().splitlines()]
    assert len(samples) == 16 and set(samples[0]["rewards"]) == {"vowels"}
    assert "step 4/4" in (run / "train.log").read_text()
    best = json.loads((run / "best" / "best.json").read_text())
    accuracies = {line["step"]: line["eval/accuracy"] for line in read_metrics(run) if "eval/accuracy" in line}
    trained = {step: accuracy for step, accuracy in accuracies.items() if step > 0}
    assert best == {"step": status["best_step"], "accuracy": max(trained.values())}
    assert best["step"] == min(step for step, accuracy in trained.items() if accuracy == best["accuracy"])
    load_policy(config.model.model_copy(update={"path": str(run / "best")}))
    logged = [line["eval/perplexity"] for line in read_metrics(run) if "eval/perplexity" in line]
    assert len(logged) == 3 and min(logged) > 1
    (check,) = [check for check in check_health(read_run(run).metrics) if check.name == "High perplexity"]
    assert check.figure == f"Perplexity {logged[0]:.1f} at the start, {logged[-1]:.1f} at the end."


def write_language_model(folder, tokenizer):
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "lm")
    size = len(AutoTokenizer.from_pretrained(tokenizer))
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder / "lm")
    return folder / "lm"


@dataclass(frozen=True)
class Unreadable:
    """An image whose file is damaged."""

    key: str = "damaged"

    def load(self):
        raise ValueError("The image cannot be decoded.")

    def header_pixels(self) -> None:
        return None


@dataclass(frozen=True)
class DamagedData(ToyData):
    """The first two samples have images that cannot be read."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return replace(sample, images=(Unreadable(),)) if index < 2 else sample


@pytest.mark.parametrize("allowed", [0.05, 0.6])
def test_unscored_validation_questions_are_reported(folder, tmp_path, allowed):
    """The accuracy of the rest does not select a model, unless the settings allow that many."""
    config = toy_config(
        folder,
        tmp_path / "run",
        train={"steps": 1, "eval_steps": 1},
        eval={"fail_on_unscored": allowed, "bootstrap": 20},
    )
    run = train(config, train_set=ToyData(), val_set=DamagedData(4))
    assert "50.0% of the validation questions could not be scored" in (run / "train.log").read_text()
    assert (run / "best").exists() == (allowed > 0.5)


def test_training_raises_the_reward(folder, tmp_path):
    changes = {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 0}, "loss": {"beta": 0.0}}
    config = toy_config(folder, tmp_path / "run", train={"steps": 25}, **changes)
    rewards = [line["reward"] for line in read_metrics(train(config, train_set=ToyData(is_endless=True)))]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_gradient_does_not_depend_on_the_micro_batch_split(folder, tmp_path, kind):
    results = []
    for size in (4, 2, 1):
        config = toy_config(
            folder,
            tmp_path,
            train={"prompts_per_micro_batch": size},
            loss={"type": kind},
            optimizer={"max_grad_norm": None},
        )
        results.append(gradients(config))
    for other in results[1:]:
        for name, gradient in results[0].items():
            assert (gradient - other[name]).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_the_first_of_several_rounds_is_on_policy(folder, tmp_path):
    """With one round ratios are 1, so nothing is clipped; in a second round with a large step they are not."""
    changes = {"optimizer": {"learning_rate": 3e-2, "warmup_steps": 0}}
    one = train(toy_config(folder, tmp_path / "one", train={"steps": 1}, **changes), train_set=ToyData())
    two = train(
        toy_config(folder, tmp_path / "two", train={"steps": 1}, loss={"num_iterations": 2}, **changes),
        train_set=ToyData(),
    )
    first, second = read_metrics(one)[0], read_metrics(two)[0]
    assert first["clip_ratio/region_mean"] == 0.0
    assert second["clip_ratio/region_mean"] > 0.05
    assert second["entropy"] == first["entropy"]


def test_masked_truncated_completions_get_no_gradient(folder, tmp_path):
    """Random models never stop, so all completions are truncated and nothing is left to learn from."""
    config = toy_config(
        folder,
        tmp_path / "run",
        train={"steps": 1},
        rollout={"max_completion_length": 3},
        loss={"mask_truncated_completions": True, "beta": 0.5},
    )
    line = read_metrics(train(config, train_set=ToyData()))[0]
    assert line["completions/clipped_ratio"] == 1.0
    assert (line["loss"], line["grad_norm"], line["kl"]) == (0.0, 0.0, 0.0)


def test_dry_run_leaves_nothing_behind(folder, tmp_path, capsys):
    train(toy_config(folder, tmp_path / "run"), train_set=ToyData(), dry_run=True)
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert "4 prompts x 4 completions" in printed and "loss" in printed and "GiB" in printed


def test_a_non_finite_loss_reports_step_samples_and_checkpoint(folder, tmp_path, monkeypatch):
    config = toy_config(folder, tmp_path / "run")
    calls = []

    def poisoned(inputs, counts, config):
        calls.append(None)
        if len(calls) > 2:  # from step 2 on
            inputs = inputs._replace(logps=inputs.logps * torch.nan)
        return grpo_loss(inputs, counts, config)

    monkeypatch.setitem(update_module.LOSSES, config.loss.type, poisoned)
    with pytest.raises(NonFiniteError, match=r"Step 2: the loss is nan \(samples: toy-\d, toy-\d"):
        train(config, train_set=ToyData())
    run = tmp_path / "run"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    failed = [json.loads(line) for line in (run / "failed_step_000002.jsonl").read_text().splitlines()]
    assert len(failed) == 4 and all(len(group["completions"]) == 4 for group in failed)
    weights = load_policy(config.model.model_copy(update={"path": str(run / "checkpoints" / "step_000001")}))
    assert all(bool(parameter.isfinite().all()) for parameter in weights.model.parameters())


def test_too_many_unscored_completions_stop_the_run(folder, tmp_path, monkeypatch):
    import toy

    def half(prompts, completions, completion_ids, **kwargs):
        return [float("nan") if index % 2 else 1.0 for index in range(len(completions))]

    monkeypatch.setattr(toy, "half", half, raising=False)
    config = toy_config(folder, tmp_path / "run", rewards={"functions": {"toy.half": 1.0}, "max_unscored": 0.4})
    with pytest.raises(UnscoredError, match="Step 1: 50% of the completions could not be scored by half") as stopped:
        train(config, train_set=ToyData())
    assert str(stopped.value).endswith("rewards.max_unscored is 40%: repair the reward, and continue with --resume.")
    config = toy_config(
        folder,
        tmp_path / "tolerant",
        rewards={"functions": {"toy.half": 1.0}, "max_unscored": 0.5},
        train={"steps": 1},
    )
    line = read_metrics(train(config, train_set=ToyData()))[0]
    assert (line["unscored_rate"], line["frac_reward_zero_std"]) == (0.5, 1.0)


@dataclass(frozen=True)
class NoData(ToyData):
    length: int = 0


def test_bad_input_raises_a_clear_error(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="The train split of toy is empty"):
        train(toy_config(folder, tmp_path / "empty"), train_set=NoData())
    with pytest.raises(ValueError, match="no such folder"):
        train(toy_config(tmp_path / "missing", tmp_path / "run"), train_set=ToyData())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file"):
        train(toy_config(folder, tmp_path / "file"), train_set=ToyData())


@pytest.mark.slow
def test_two_ranks_get_the_gradient_of_one(folder, tmp_path):
    """Two processes share four groups out, one of which has an unscored completion. Both get the whole gradient."""
    changes = {"optimizer": {"max_grad_norm": None}, "train": {"steps": 2, "prompts_per_micro_batch": 1}}
    config = toy_config(folder, tmp_path / "two", **changes)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        forking.Popen(
            [sys.executable, str(TOY), "ranks", str(tmp_path / "config.json")],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"},
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    alone = gradients(toy_config(folder, tmp_path / "one", **changes))
    for rank in range(2):
        found = torch.load(f"{config.output_dir}.rank{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for name, gradient in alone.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    one = train(toy_config(folder, tmp_path / "one", **changes), train_set=ToyData())
    for line, expected in zip(read_metrics(tmp_path / "two"), read_metrics(one), strict=True):
        assert line.keys() == expected.keys()
        for name, value in expected.items():
            assert line[name] == value or line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
