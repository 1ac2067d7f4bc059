"""A resumed run ends bitwise identical to one that was never interrupted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import toy
from filelock import FileLock
from safetensors import safe_open
from toy import ToyData, read_metrics, toy_config

from medvqa_rl.config import Config
from medvqa_rl.config.yaml import load_config
from medvqa_rl.core.files import AppendedFile, checkpoint_folder, run_config
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run import checkpoint
from medvqa_rl.learning.run.checkpoint import clean_up
from medvqa_rl.learning.run.errors import RunFolderLost, Stopped
from medvqa_rl.learning.run.logger import RunLogger
from medvqa_rl.learning.run.resume import Resume, promise, read_resumes, still_counts
from medvqa_rl.learning.sft import train_sft
from medvqa_rl.models.loading import load_policy
from tests import forking

TOY = Path(__file__).parents[1] / "toy.py"
STOP = {"steps": 6, "save_steps": 2, "eval_steps": 3}


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_vl")


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor; NumPy has no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def weights(run: Path, step: int) -> dict[str, bytes]:
    """Model and optimizer of a checkpoint, as bytes."""
    found = {}
    for path in sorted((run / "checkpoints" / f"step_{step:06d}").rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {f"{path.name}/{name}": bits(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    assert found
    return found


def go(config, *, resume=False, loop=train):
    return loop(config, train_set=ToyData(), val_set=ToyData(3), resume=resume)


def same_runs(first: Path, second: Path, step: int = 6) -> None:
    assert weights(first, step) == weights(second, step)
    # Compared as text, because NaN != NaN.
    assert json.dumps(read_metrics(first)) == json.dumps(read_metrics(second))
    names = [
        sorted(p.relative_to(run).as_posix() for kind in ("samples", "eval") for p in run.glob(f"{kind}/step_*"))
        for run in (first, second)
    ]
    assert names[0] == names[1]


class Crash(Exception):
    """Ends a run in the middle of a step."""


LORA = {"lora": {"rank": 2, "dropout": 0.2}, "train_projector": False}
LORA_AND_VISION = {"lora": {"rank": 2}, "train_projector": True, "train_vision": True}
ENTROPY = {"type": "sapo", "num_iterations": 2, "entropy_coef": 0.1, "top_entropy_quantile": 0.5}


@pytest.mark.parametrize(
    ("crash_at", "changes"),
    [
        (1, {}),
        (5, {}),
        (3, {"model": LORA}),
        (3, {"model": LORA_AND_VISION, "loss": {"num_iterations": 2}}),
        (3, {"model": {"dtype": "bfloat16"}}),
        (3, {"model": LORA, "loss": ENTROPY, "advantage": {"scale": "whiten"}}),
    ],
    ids=["no-checkpoint", "full", "lora", "lora-vision-rounds", "bfloat16", "entropy"],
)
def test_resume_is_exact(folder, tmp_path, monkeypatch, crash_at, changes):
    config = toy_config(folder, tmp_path / "whole", train=STOP, **changes)
    whole = go(config)
    broken = config.model_copy(update={"output_dir": str(tmp_path / "broken")})
    original = toy.vowels

    def crashing(prompts, completions, completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == crash_at:
            raise Crash
        return original(prompts, completions, completion_ids, trainer_state, **kwargs)

    monkeypatch.setattr(toy, "vowels", crashing)
    with pytest.raises(Crash):
        go(broken)
    assert json.loads((tmp_path / "broken" / "status.json").read_text())["state"] == "failed"
    monkeypatch.setattr(toy, "vowels", original)
    torch.manual_seed(99)  # results must not depend on torch's global generator
    same_runs(whole, go(broken, resume=True))


def test_resume_starts_from_the_newest_checkpoint(folder, tmp_path, monkeypatch):
    """An older one gives the same weights in the end, so count the steps that are computed again."""
    go(toy_config(folder, tmp_path / "run", train={"steps": 3, "save_steps": 1}))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    original, steps = toy.vowels, []

    def recording(prompts, completions, completion_ids, trainer_state, **kwargs):
        steps.append(trainer_state.global_step)
        return original(prompts, completions, completion_ids, trainer_state, **kwargs)

    monkeypatch.setattr(toy, "vowels", recording)
    go(toy_config(folder, tmp_path / "run", train={"steps": 4, "save_steps": 1}), resume=True)
    assert steps == [3]


def run_toy(mode: str, config, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    return forking.run(
        [sys.executable, str(TOY), mode, str(path)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("death", ["reward:1", "reward:3", "save:4"])
def test_kill_9_and_resume(folder, tmp_path, death):
    """Killed before the first checkpoint, after one, and while writing one."""
    config = toy_config(folder, tmp_path / "killed", train=STOP)
    process = run_toy("train", config, tmp_path, TOY_DEATH=death)
    assert process.returncode == -9, process.stderr
    run = tmp_path / "killed"
    assert json.loads((run / "status.json").read_text())["state"] == "running"
    if death == "save:4":
        assert list((run / "checkpoints").glob(".step_000004.*.partial"))  # partial, under a temporary name
        assert not (run / "checkpoints" / "step_000004").exists()
    process = run_toy("resume", config, tmp_path)
    assert process.returncode == 0, process.stderr
    same_runs(go(toy_config(folder, tmp_path / "whole", train=STOP)), run)
    assert not list(run.rglob("*.partial"))


@pytest.mark.slow
def test_sigterm_finishes_the_step_and_saves(folder, tmp_path):
    config = toy_config(folder, tmp_path / "run", train=STOP | {"save_steps": 0})
    process = run_toy("train", config, tmp_path, TOY_STOP="2")
    assert process.returncode == 143
    assert "Stopping after this step" in process.stderr and "Stopped after step 3" in process.stderr
    assert f"`medvqa-rl train {tmp_path / 'run' / 'config.yaml'} --resume`" in process.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
    run = go(config, resume=True)
    same_runs(go(toy_config(folder, tmp_path / "whole", train=STOP | {"save_steps": 3})), run)


def test_stopping_and_resuming_twice_in_one_process(folder, tmp_path, monkeypatch):
    config = toy_config(folder, tmp_path / "run", train=STOP | {"save_steps": 0, "eval_steps": 0})
    for step in (1, 3):
        monkeypatch.setenv("TOY_STOP", str(step))
        with pytest.raises(Stopped) as stopped:
            go(config, resume=step > 1)
        assert stopped.value.code == 143
    monkeypatch.delenv("TOY_STOP")
    whole = toy_config(folder, tmp_path / "whole", train=STOP | {"save_steps": 0, "eval_steps": 0})
    assert weights(go(whole), 6) == weights(go(config, resume=True), 6)


def test_sft_resumes_exactly(folder, tmp_path):
    config = toy_config(
        folder, tmp_path / "parts", train=STOP | {"steps": 3}, optimizer={"lr_scheduler_type": "constant"}
    )
    go(config, loop=train_sft)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 6})})
    go(longer, loop=train_sft, resume=True)
    whole = longer.model_copy(update={"output_dir": str(tmp_path / "whole")})
    assert weights(go(whole, loop=train_sft), 6) == weights(tmp_path / "parts", 6)
    with pytest.raises(ValueError, match="was started by `sft`"):
        go(longer, resume=True)


def test_changed_settings_are_refused_and_listed(folder, tmp_path):
    config = toy_config(folder, tmp_path / "run", train={"steps": 1})
    go(config)
    changed = toy_config(
        folder,
        tmp_path / "run",
        train={"steps": 3, "logging_steps": 2, "save_steps": 1, "prompts_per_step": 2},
        loss={"beta": 0.1},
    )
    message = r"loss\.beta \(0\.04 -> 0\.1\), train\.prompts_per_step \(4 -> 2\)\. Set them back"
    with pytest.raises(ValueError, match=message):
        go(changed, resume=True)
    go(toy_config(folder, tmp_path / "run", train={"steps": 2, "save_steps": 1}), resume=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


@dataclass(frozen=True)
class OtherData(ToyData):
    fingerprint: str = "toy-2"


def test_other_data_is_refused(folder, tmp_path):
    go(toy_config(folder, tmp_path / "run", train={"steps": 1}))
    with pytest.raises(ValueError, match="The train data has changed since this run was started"):
        train(toy_config(folder, tmp_path / "run", train={"steps": 2}), train_set=OtherData(), resume=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("status.json", "{", r"status\.json is not JSON"),
        ("status.json", "[]", r"status\.json has \[\]"),
        ("status.json", "{}", r"status\.json has no field kind"),
        ("status.json", '{"kind": "train", "state": "x", "step": "1", "steps": 2}', r"has '1' under step"),
        ("data.json", '{"train": 3}', r"data\.json has 3 under train"),
        ("data.json", '{"train": {"fingerprint": 3}}', r"has 3 under train\.fingerprint"),
        ("env.json", "[]", r"env\.json has \[\]"),
        ("config.resolved.json", '{"train": {"steps": "3"}}', r"config\.resolved\.json has '3' under train\.steps"),
    ],
)
def test_damaged_files_of_a_run_are_named(folder, tmp_path, name, text, message):
    config = toy_config(folder, tmp_path / "run", train={"steps": 1})
    go(config)
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(ValueError, match=f"{message}.*: restore the file, or start a new run"):
        go(config, resume=True)


def test_a_resume_removes_checkpoints_that_a_killed_process_left(folder, tmp_path):
    """A process can be killed between saving a checkpoint and removing the oldest."""
    config = toy_config(folder, tmp_path / "run", train={"steps": 3, "save_steps": 1, "save_total_limit": 2})
    checkpoints = go(config) / "checkpoints"
    shutil.copytree(checkpoints / "step_000002", checkpoints / "step_000001")
    go(config, resume=True)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000002", "step_000003"]


def test_a_folder_in_use_is_refused(folder, tmp_path):
    config = toy_config(folder, tmp_path / "run", train={"steps": 1})
    with pytest.raises(ValueError, match="There is no run to resume"):
        go(config, resume=True)
    go(config)
    with pytest.raises(
        ValueError, match=r"already contains a run \(finished at step 1 of 1\): continue it with --resume"
    ):
        go(config)
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="Another process is using"):
        go(config, resume=True)


def test_a_failed_start_leaves_the_folder_free(folder, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        go(toy_config(tmp_path / "missing", tmp_path / "run"))
    go(toy_config(folder, tmp_path / "run", train={"steps": 1}))


def test_a_run_that_fails_before_it_starts_leaves_nothing(folder, tmp_path):
    """And removes nothing from a folder that existed before."""
    bad = {"model": {"path": str(tmp_path / "missing")}}
    with pytest.raises(ValueError, match="no such folder"):
        go(toy_config(folder, tmp_path / "run", **bad))
    assert not (tmp_path / "run").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.yaml").write_text("mine")
    with pytest.raises(ValueError, match="no such folder"):
        go(toy_config(folder, tmp_path / "notes", **bad))
    assert (tmp_path / "notes" / "config.yaml").exists()


def change(config, **sections):
    """A copy of a config: ``train={"steps": 3}``."""
    updates = {name: getattr(config, name).model_copy(update=update) for name, update in sections.items()}
    return config.model_copy(update=updates)


def resumes_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "resumes.jsonl").read_text().splitlines()]


def test_the_first_settings_are_kept_and_each_resume_is_recorded(folder, tmp_path):
    config = toy_config(folder, tmp_path / "run", train={"steps": 1})
    run = go(config)
    first = [(run / name).read_bytes() for name in ("config.yaml", "config.resolved.json")]
    assert run_config(run) == run / "config.yaml" and not (run / "resumes.jsonl").exists()
    longer = change(config, train={"steps": 2, "save_steps": 1})
    go(longer, resume=True)
    go(longer, resume=True)  # nothing to do, and nothing changed since
    go(change(longer, train={"steps": 3}), resume=True)
    assert [(run / name).read_bytes() for name in ("config.yaml", "config.resolved.json")] == first
    assert sorted(path.name for path in run.glob("config.resume_*")) == [
        "config.resume_1.yaml",
        "config.resume_3.yaml",
    ]
    # The printed resume command uses this file.
    assert run_config(run) == run / "config.resume_3.yaml" and load_config(run_config(run)).config.train.steps == 3
    one, two, three = resumes_of(run)
    assert one["settings"] == two["settings"] == {"train.save_steps": [0, 1], "train.steps": [1, 2]}
    assert (three["step"], three["checkpoint"]) == (2, "checkpoints/step_000002")
    assert three["settings"] == {"train.save_steps": [0, 1], "train.steps": [1, 3]} and three["environment"] == []


def test_free_settings_change_no_bit(folder, tmp_path):
    config = toy_config(folder, tmp_path / "parts", train={"steps": 4}, model=LORA)
    config = change(config, optimizer={"lr_scheduler_type": "constant"})
    whole = go(change(config.model_copy(update={"output_dir": str(tmp_path / "whole")}), train={"steps": 6}))
    go(config)
    free = change(
        config,
        train={"steps": 6, "save_steps": 1, "self_check": False, "log_completions_steps": 1},
        model={"gradient_checkpointing": True},
        prefetch={"workers": 0},
        rewards={"max_unscored": 0.5},
    )
    run = go(free, resume=True)
    assert weights(whole, 6) == weights(run, 6)
    (resume,) = resumes_of(run)
    assert resume["promise"] == (
        "From step 5 on, the run has 6 steps in place of 4. Apart from that, the results are equal to those of an "
        "uninterrupted run bit for bit."
    )


def test_settings_of_batches_change_rounding_only(folder, tmp_path):
    config = toy_config(folder, tmp_path / "parts", train={"steps": 4, "save_steps": 2})
    whole = go(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    go(config)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_000004")
    other = change(
        config, train={"prompts_per_micro_batch": 1, "max_tokens_per_micro_batch": 4000}, rollout={"max_batch": 1}
    )
    run = go(other, resume=True)
    assert [line["reward"] for line in read_metrics(run)] == [line["reward"] for line in read_metrics(whole)]
    norms = [[line["grad_norm"] for line in read_metrics(path)] for path in (run, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    (resume,) = resumes_of(run)
    assert resume["promise"] == (
        "The results are equal to those of an uninterrupted run within rounding, because of rollout.max_batch "
        "(64 -> 1), train.max_tokens_per_micro_batch (null -> 4000), train.prompts_per_micro_batch (2 -> 1)."
    )
    # The steps of that resume are kept, so the promise of the next one is no stronger.
    assert go(change(config, train={"steps": 4}), resume=True)
    assert resumes_of(run)[1]["settings"] == {} and resumes_of(run)[1]["promise"] == resume["promise"]


def resume_at(step, settings=None, environment=()):
    return Resume(step=step, checkpoint=None, settings=settings or {}, environment=list(environment))


@pytest.mark.parametrize(
    ("starts", "step", "kept"),
    [([4], 6, [4]), ([4], 4, []), ([4, 4], 6, [4]), ([4, 8, 2], 6, [2]), ([2, 4, 8], 9, [2, 4, 8]), ([], 3, [])],
)
def test_a_resume_counts_if_some_of_its_steps_are_kept(starts, step, kept):
    assert [resume.step for resume in still_counts([resume_at(start) for start in starts], step)] == kept


@pytest.mark.parametrize(
    ("resumes", "config", "is_gpu", "expected"),
    [
        ([resume_at(2)], {}, False, "equal to those of an uninterrupted run bit for bit."),
        ([resume_at(2)], {}, True, "within rounding, because of GPU kernels, which add in no fixed order."),
        ([resume_at(2, environment=["threads (1 -> 2)"])], {}, False, "within rounding, because of threads (1 -> 2)."),
        ([resume_at(2)], {"rollout": {"engine": "vllm"}}, True, "similar to those of an uninterrupted run, not equal"),
        (
            [resume_at(2, {"train.prompts_per_micro_batch": (8, 4)})],
            {"model": {"lora": {"dropout": 0.1}}},
            False,
            "(8 -> 4); LoRA's dropout draws other masks.",
        ),
        (
            [resume_at(2, {"train.steps": (4, 6)})],
            {"optimizer": {"lr_scheduler_type": "linear"}},
            False,
            "From step 3 on, the run has 6 steps in place of 4, and the linear learning rate follows the new number.",
        ),
        ([resume_at(2, {"output_dir": ("a", "b")})], {}, False, "bit for bit."),
    ],
)
def test_a_resumed_run_says_what_it_promises(resumes, config, is_gpu, expected):
    assert expected in promise(resumes, Config.model_validate(config), is_gpu=is_gpu)


def test_damaged_records_of_resumes_are_named(tmp_path):
    path = tmp_path / "resumes.jsonl"
    path.write_text(resume_at(1).model_dump_json() + '\n{"step": "x"}\n')
    with pytest.raises(ValueError, match=r"resumes\.jsonl is damaged: line 2, step: .*integer"):
        read_resumes(path)


def test_a_file_limit_is_reported_and_earlier_checkpoints_stay(folder, tmp_path, monkeypatch, file_limit):
    config = toy_config(folder, tmp_path / "run", train=STOP | {"eval_steps": 0})
    write = checkpoint.save_file
    written = []

    def limited(tensors, path):
        written.append(path)
        with file_limit(1000) if len(written) == 2 else nullcontext():
            write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", limited)
    with pytest.raises(OSError) as caught:
        go(config)
    run = tmp_path / "run"
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(checkpoint_folder(run, 4)))
    assert f"The last checkpoint is {checkpoint_folder(run, 2)}: continue with" in caught.value.__notes__[-1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    monkeypatch.setattr(checkpoint, "save_file", write)
    same = go(toy_config(folder, tmp_path / "whole", train=STOP | {"eval_steps": 0}))
    same_runs(same, go(config, resume=True))


@pytest.mark.parametrize("name", ["_metrics", "_log"])
def test_a_full_disk_is_reported_when_logging(folder, tmp_path, monkeypatch, name):
    def enter(logger):
        setattr(logger, name, AppendedFile(Path("/dev/full")))
        return logger

    monkeypatch.setattr(RunLogger, "__enter__", enter)
    with pytest.raises(OSError) as caught:
        go(toy_config(folder, tmp_path / "run"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


def after_step(monkeypatch, step, act):
    """Do something to the run's folder after a step, before its evaluation and checkpoint."""
    show = RunLogger.show

    def shown(logger, now, metrics):
        show(logger, now, metrics)
        if now == step and "eval/accuracy" not in metrics:
            act()

    monkeypatch.setattr(RunLogger, "show", shown)


def kept(run: Path) -> dict[str, bytes]:
    """What must not be lost: the best model, and all but the times of the metrics."""
    best = {path.name: path.read_bytes() for path in (run / "best").iterdir()}
    return best | {"metrics": json.dumps(read_metrics(run)).encode()}


def test_what_is_removed_during_a_run_is_written_again(folder, tmp_path, monkeypatch):
    train = {"steps": 5, "save_steps": 2, "eval_steps": 2, "log_completions_steps": 1}
    whole, run = (go(toy_config(folder, tmp_path / "whole", train=train)), tmp_path / "run")

    def remove():
        for name in ("best", "samples", "eval"):
            shutil.rmtree(run / name)
        (run / "train.log").unlink()
        (run / "status.json").unlink()
        (run / "other").write_text("replaced")
        os.replace(run / "other", run / "metrics.jsonl")

    after_step(monkeypatch, 3, remove)
    go(toy_config(folder, run, train=train))
    assert kept(run) == kept(whole)
    log = (run / "train.log").read_text()
    for name in ("train.log", "metrics.jsonl"):
        assert log.count(f"{name} was removed or replaced during the run, and is written again.") == 1
    assert f"best was removed, and is written again from {checkpoint_folder(run, 2)}" in log
    assert "step 1/5" in log and "step 5/5" in log
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "step_000003.jsonl",
        "step_000004.jsonl",
        "step_000005.jsonl",
    ]


def test_a_best_checkpoint_that_cannot_be_written_again_is_said_to_be_missing(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    after_step(monkeypatch, 4, lambda: shutil.rmtree(run / "best"))
    go(toy_config(folder, run, train={"steps": 6, "save_steps": 2, "eval_steps": 3, "save_total_limit": 1}))
    log = (run / "train.log").read_text()
    assert log.count("because there is no checkpoint of its step 3: the next evaluation") == 1
    assert (run / "best").is_dir() or f"The best checkpoint of {run}, of step 3, was removed" in log


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_run_whose_folder_is_removed_ends_and_leaves_its_place_alone(folder, tmp_path, monkeypatch, is_replaced):
    run = tmp_path / "run"

    def remove():
        run.rename(tmp_path / "moved")
        if is_replaced:
            run.mkdir()

    after_step(monkeypatch, 3, remove)
    with pytest.raises(RunFolderLost, match=f"The folder {run} was removed, moved or replaced"):
        go(toy_config(folder, run, train=STOP))
    assert run.exists() == is_replaced and not list(run.glob("*"))
    assert [path.name for path in (tmp_path / "moved" / "checkpoints").iterdir()] == ["step_000002"]


def test_leftovers_are_removed_and_a_replaced_folder_is_restored(tmp_path):
    (tmp_path / "checkpoints" / ".step_000002.123.tmp").mkdir(parents=True)
    (tmp_path / ".best.123.old").mkdir()
    (tmp_path / ".best.123.old" / "best.json").write_text("{}")
    (tmp_path / "checkpoints" / ".step_000004.host-7-0a0a0a0a.partial" / "trainer").mkdir(parents=True)
    (tmp_path / ".status.json.7-0a.partial").touch()
    for name in (".notes.tmp", ".bashrc.old", ".notes.7.old"):  # not ours
        (tmp_path / name).mkdir()
    clean_up(tmp_path)
    assert (tmp_path / "best" / "best.json").exists()
    left = sorted(path.name for path in tmp_path.rglob("*") if path.name != "best.json")
    assert left == [".bashrc.old", ".notes.7.old", ".notes.tmp", "best", "checkpoints"]


def test_checkpoints_are_standard_and_the_reference_keeps_the_initial_weights(folder, tmp_path):
    """A resumed run measures the KL from the initial weights, not from the checkpoint."""
    config = toy_config(folder, tmp_path / "run", train=STOP, loss={"beta": 0.04})
    run = go(config)
    policy = load_policy(config.model.model_copy(update={"path": str(run / "checkpoints" / "step_000006")}))
    assert policy.processor.tokenizer.chat_template
    assert read_metrics(run)[-2]["kl"] > 0
