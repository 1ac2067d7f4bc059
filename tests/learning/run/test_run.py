"""How a run ends before its last step: what is saved, what the message says, and that the resumed run is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import toy
from toy import ToyData, checkpoint_bytes, read_metrics, toy_config

from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run import run as run_module
from medvqa_rl.learning.run.errors import OutOfMemory, TrainingFailed
from medvqa_rl.learning.run.logger import RunLogger
from medvqa_rl.learning.sft import train_sft


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_vl")


def go(config, *, resume=False, loop=train):
    return loop(config, train_set=ToyData(), val_set=ToyData(3), resume=resume)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def fail_in_reward(monkeypatch, error, *, step: int) -> None:
    """Raise an error in the reward function after some whole steps."""
    original = toy.vowels

    def failing(prompts, completions, completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == step:
            raise error
        return original(prompts, completions, completion_ids, trainer_state, **kwargs)

    monkeypatch.setattr(toy, "vowels", failing)


@pytest.mark.parametrize(
    "error", [KeyError("gold"), ValueError("not a number"), ConnectionError("judge"), SystemExit(3)]
)
def test_an_error_in_a_reward_function_saves_the_steps_before(folder, tmp_path, monkeypatch, error):
    run = tmp_path / "run"
    fail_in_reward(monkeypatch, error, step=2)
    with pytest.raises(type(error)) as failure:
        go(toy_config(folder, run))
    assert failure.value is error and checkpoints(run) == ["step_000002"]
    assert failure.value.__notes__[-1] == (
        f"Step 2 and all before it are saved in {run}/checkpoints/step_000002: continue with "
        f"`medvqa-rl train {run}/config.yaml --resume`."
    )
    assert failure.value.__notes__[-1] in (run / "train.log").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_saves_the_steps_before_and_says_what_needs_less(folder, tmp_path, monkeypatch, error):
    run = tmp_path / "run"
    fail_in_reward(monkeypatch, error, step=1)
    with pytest.raises(
        OutOfMemory, match=r"Memory ran out in step 2 \(.*[^.]\)\. Lower train\.prompts_per_micro"
    ) as failed:
        go(toy_config(folder, run))
    assert "Step 1 and all before it are saved" in failed.value.__notes__[-1]
    assert not list(run.glob("failed_step*"))  # no group is at fault
    monkeypatch.undo()
    less = toy_config(folder, run, train={"prompts_per_micro_batch": 1}, model={"gradient_checkpointing": True})
    assert len(read_metrics(go(less, resume=True))) == 6


def test_sft_names_its_own_setting_when_memory_runs_out(folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("medvqa_rl.learning.sft.sft_loss", fail)
    with pytest.raises(OutOfMemory, match=r"Lower sft\.samples_per_micro_batch, or") as failed:
        go(toy_config(folder, tmp_path / "run"), loop=train_sft)
    assert failed.value.__notes__ == [
        f"No checkpoint was written yet: start again with `medvqa-rl sft {tmp_path}/run/config.yaml --resume`."
    ]


def test_weights_between_two_steps_are_not_saved(folder, tmp_path, monkeypatch):
    """An error while weights change leaves neither the old step nor the new one."""
    step, calls = torch.optim.AdamW.step, []

    def failing(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    config = toy_config(folder, tmp_path / "run", train={"save_steps": 2})
    with pytest.raises(OutOfMemory) as failed:
        go(config)
    run = tmp_path / "run"
    assert checkpoints(run) == ["step_000002"]
    assert failed.value.__notes__[-1].startswith(
        f"The last checkpoint is {run}/checkpoints/step_000002: continue with"
    )
    monkeypatch.undo()
    whole = go(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    assert checkpoint_bytes(go(config, resume=True), 6) == checkpoint_bytes(whole, 6)


def text(run: Path) -> str:
    return json.dumps(read_metrics(run))  # NaN != NaN


@pytest.mark.parametrize("where", ["evaluation", "tracker", "tracker of an evaluation"])
def test_what_failed_after_a_step_is_made_up_for(folder, tmp_path, monkeypatch, where):
    """The resumed run has the same metrics, evaluations and best model as one that was not interrupted."""
    config = toy_config(folder, tmp_path / "run", train={"steps": 4, "eval_steps": 2})
    run, calls, show = tmp_path / "run", [], RunLogger.show

    def fail(self, step, metrics):
        is_evaluation = any(name.startswith("eval/") for name in metrics)
        if step == 2 and is_evaluation == (where != "tracker"):
            raise ConnectionError("tracker")
        show(self, step, metrics)

    def fail_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory for the evaluation")
        return validate(*args, **kwargs)

    validate = run_module.validate
    if where == "evaluation":
        monkeypatch.setattr(run_module, "validate", fail_second)
    else:
        monkeypatch.setattr(RunLogger, "show", fail)
    with pytest.raises((RuntimeError, ConnectionError)):
        go(config)
    assert checkpoints(run) == ["step_000002"]
    assert json.loads((run / "checkpoints" / "step_000002" / "trainer" / "state.json").read_text())[
        "is_evaluated"
    ] == (where == "tracker of an evaluation")
    monkeypatch.undo()
    go(config, resume=True)
    whole = go(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    assert text(run) == text(whole) and checkpoint_bytes(run, 4) == checkpoint_bytes(whole, 4)
    assert (run / "best" / "best.json").read_text() == (whole / "best" / "best.json").read_text()
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["step_000000", "step_000002", "step_000004"]


def test_a_checkpoint_that_cannot_be_saved_hides_nothing(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise ValueError("No space is left to write the checkpoint: free some.")

    monkeypatch.setattr(run_module, "save_checkpoint", full)
    fail_in_reward(monkeypatch, KeyError("gold"), step=1)
    with pytest.raises(KeyError) as failure:
        go(toy_config(folder, tmp_path / "run"))
    assert failure.value.__notes__[-1].startswith(
        "The steps since the last checkpoint could not be saved. No space is left to write the checkpoint"
    )


def test_groups_are_written_only_if_some_are_at_fault(folder, tmp_path, monkeypatch):
    fail_in_reward(monkeypatch, TrainingFailed("vLLM is gone.", ()), step=1)
    with pytest.raises(TrainingFailed) as failure:
        go(toy_config(folder, tmp_path / "run"))
    assert [note[:6] for note in failure.value.__notes__[1:]] == ["Step 1"] and not list(
        tmp_path.rglob("failed_step*")
    )
