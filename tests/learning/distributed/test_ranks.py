"""Training on two ranks equals training on one, under every engine; and a lost rank ends the run.

Two CPU processes with gloo, float32. One process forks the ranks of all runs (ranks.py), because importing is slow.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import read_metrics, toy_config

from medvqa_rl.learning.distributed.roll_call import PHASES
from medvqa_rl.models.checkpoints import write_model
from tests import forking
from tests.models.families.tiny import BUILDERS, tiny_policy

RANKS = Path(__file__).parents[1] / "ranks.py"
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
OFFLOADED = ("zero2_offload", "zero3_offload")
"""ZeRO with the optimizer's state offloaded to the CPU, in stage 3 the weights too."""
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
STEPS = 5

pytestmark = pytest.mark.slow

LORA = {"lora": {"rank": 2}, "train_projector": False}
SCENARIOS: dict[str, dict[str, Any]] = {
    # All weights and the projector, with a reference, gradient clipping and weight decay.
    "full": {},
    "lora": {"model": LORA},
    # The vision tower too. Every other prompt has no image and no gradient, so ranks have unequal work.
    "mixed": {
        "model": {"train_vision": True},
        "loss": {"beta": 0.0},
        "rewards": {"functions": {"ranks.rare": 1.0}},
    },
    # Standard deviation, threshold and mean entropy over the prompts of both ranks, in two rounds.
    "entropy": {
        "model": LORA,
        "advantage": {"baseline": "leave_one_out", "scale": "whiten"},
        "loss": {
            **{"type": "cispo", "importance_sampling_level": "sequence", "num_iterations": 2, "beta": 0.0},
            **{"entropy_coef": 0.05, "top_entropy_quantile": 0.5},
        },
        "rewards": {"functions": {"ranks.rare": 1.0}},
    },
}
BFLOAT16: dict[str, Any] = {"model": {"dtype": "bfloat16"}}


def job(folder: Path, tmp: Path, name: str, engine: str | None, scenario: str = "full", **more: Any) -> dict[str, Any]:
    """Two ranks under an engine, or a single process if ``engine`` is None."""
    changes = (SCENARIOS | {"bfloat16": BFLOAT16})[scenario] | {
        key: value for key, value in more.items() if key in ("train",)
    }
    settings = {
        "model": {"path": str(folder), "device": "cpu", "train_projector": True} | changes.get("model", {}),
        "loss": changes.get("loss", {}),
        "advantage": changes.get("advantage", {}),
        "rewards": {"format": 0.0, "correctness": 0.0, "functions": {"toy.vowels": 1.0}} | changes.get("rewards", {}),
        "optimizer": {
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.05,  # below the actual norms, so that gradients are clipped
            "weight_decay": 0.01,
        },
        "eval": {"batch_size": 1},  # three batches for two ranks
        "train": {"steps": STEPS, "prompts_per_micro_batch": 1, "log_completions_steps": 0, "eval_steps": STEPS}
        | changes.get("train", {}),
    }
    config = toy_config(folder, tmp / name, **settings)
    return {
        "name": name,
        "engine": engine or "ddp",
        "ranks": 1 if engine is None else 2,
        "config": config.model_dump(mode="json"),
        "mixed": scenario == "mixed",
        "completions": str(tmp / f"{scenario}-completions.json"),
        **{key: value for key, value in more.items() if key != "train"},
    }


def run(jobs: list[dict[str, Any]], tmp: Path) -> tuple[dict[str, list[int]], str]:
    """Exit codes of the ranks of each job, and standard error."""
    path = tmp / "jobs.json"
    path.write_text(json.dumps(jobs))
    process = forking.run(
        [sys.executable, str(RANKS), str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), process.stderr


def sections(errors: str) -> dict[str, str]:
    """Standard error of each job."""
    parts = re.split(r"^== (\S+) ==$", errors, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def needs(engine: str) -> None:
    if engine.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("needs the extra deepspeed: `make test-ranks` installs it")


@pytest.fixture(scope="module")
def runs(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs: one per scenario and engine, resumed runs, and runs with perturbed advantages."""
    tmp, folder = tmp_path_factory.mktemp("ranks"), tiny_folder("qwen2_vl")
    engines = [engine for engine in ENGINES if HAS_DEEPSPEED or not engine.startswith("zero")]
    offloaded = OFFLOADED if HAS_DEEPSPEED else ()
    jobs = [
        job(folder, tmp, f"{scenario}-{engine}", engine, scenario, gradient=str(tmp / f"{scenario}-{engine}.pt"))
        for scenario in (*SCENARIOS, "bfloat16")
        for engine in (None, *engines, *(offloaded if scenario in ("full", "bfloat16") else ()))
    ]
    jobs.append(job(folder, tmp, "perturbed", "ddp", perturb=True))
    jobs.append(job(folder, tmp, "bfloat16-perturbed", "ddp", "bfloat16", perturb=True))
    around = [*engines, *offloaded]
    for first, then in [("ddp", None), *zip(around, [*around[1:], around[0]])]:
        name = f"resumed-{first}-{then}"
        jobs.append(job(folder, tmp, name, first, train={"steps": 2}))
        jobs.append(job(folder, tmp, name, then, resume=True))
    codes, errors = run(jobs, tmp)
    assert all(code == 0 for ranks in codes.values() for code in ranks), errors
    (tmp / "errors.json").write_text(json.dumps(sections(errors)))
    flips = [(int(few), int(of)) for few, of in re.findall(r"flipped (\d+) of (\d+)", errors)]
    assert sum(few for few, _ in flips) <= 0.02 * sum(of for _, of in flips)
    return tmp


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of any weight."""
    assert first and first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    ("engine", "scenario"), [*itertools.product(ENGINES, SCENARIOS), *((engine, "full") for engine in OFFLOADED)]
)
def test_two_ranks_train_as_one(runs: Path, tiny_folder: Any, scenario: str, engine: str) -> None:
    needs(engine)
    alone, ranks = runs / f"{scenario}-None", runs / f"{scenario}-{engine}"
    found, expected = (torch.load(f"{path}.pt", weights_only=True) for path in (ranks, alone))
    assert expected.keys() <= found.keys()
    for name, gradient in expected.items():
        difference = (found[name].view_as(gradient) - gradient).norm()
        assert difference <= 1e-5 * gradient.norm() + 1e-8, name
    assert distance(weights(ranks), weights(alone)) <= 2e-5
    if scenario == "full":  # and they did learn
        assert distance(weights(alone), load_file(tiny_folder("qwen2_vl") / "model.safetensors")) > 2e-4
    # Each rank computes one group at least, so with two of them fewer are skipped.
    computed = ("entropy", "frac_groups_skipped") if scenario == "mixed" else ()
    for line, single in zip(read_metrics(ranks), read_metrics(alone), strict=True):
        assert line.keys() == single.keys()
        for name, value in single.items():
            if name in computed:
                continue
            assert line[name] == value or line[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_share_an_evaluation_and_answer_as_one(runs: Path, engine: str) -> None:
    needs(engine)
    alone, ranks = runs / "full-None", runs / f"full-{engine}"
    first = "eval/step_000000/samples.jsonl"  # the weights are equal, so every answer is
    assert (ranks / first).read_bytes() == (alone / first).read_bytes()
    evaluations = len(list((ranks / "eval").iterdir()))
    answered = [int((ranks / f"answered-{rank}").read_text()) for rank in range(2)]
    assert answered == [2 * evaluations, evaluations]


@pytest.mark.parametrize("name", BUILDERS)
def test_every_family_trains_on_two_ranks(name: str, tmp_path: Path) -> None:
    """With the tower, which a rank runs on a blank image where its prompts have none."""
    write_model(tiny_policy(name), tmp_path / "model")
    names = {None: "alone", "ddp": "ddp", "fsdp2": "fsdp2"}
    jobs = [
        job(tmp_path / "model", tmp_path, to, engine, "mixed", gradient=str(tmp_path / f"{to}.pt"))
        for engine, to in names.items()
    ]
    codes, errors = run(jobs, tmp_path)
    assert all(code == 0 for ranks in codes.values() for code in ranks), errors
    expected = torch.load(tmp_path / "alone.pt", weights_only=True)
    assert all(gradient.norm() > 0 for key, gradient in expected.items() if "visual" in key or "vision" in key)
    for ranks in ("ddp", "fsdp2"):
        found = torch.load(tmp_path / f"{ranks}.pt", weights_only=True)
        assert expected.keys() <= found.keys()
        for key, gradient in expected.items():
            difference = (found[key].view_as(gradient) - gradient).norm()
            assert difference <= 1e-5 * gradient.norm() + 1e-8, (ranks, key)
        assert distance(weights(tmp_path / ranks), weights(tmp_path / "alone")) <= 2e-5


def test_wrong_advantages_are_detected(runs: Path) -> None:
    assert distance(weights(runs / "perturbed"), weights(runs / "full-None")) > 2e-5


def masters(run: Path) -> torch.Tensor:
    """The float32 master weights of a bfloat16 run, concatenated."""
    state = load_file(run / "checkpoints" / f"step_{STEPS:06d}" / "trainer" / "optimizer.safetensors")
    return torch.cat([tensor.flatten() for name, tensor in sorted(state.items()) if name.startswith("master/")])


@pytest.mark.parametrize("engine", [*ENGINES, *OFFLOADED])
def test_two_ranks_train_as_one_in_bfloat16(runs: Path, tiny_folder: Any, engine: str) -> None:
    """Within bfloat16 rounding: gradients within 1 %, weights after five steps within 6 % of the distance moved."""
    needs(engine)
    alone, ranks = runs / "bfloat16-None", runs / f"bfloat16-{engine}"
    found, expected = (torch.load(f"{path}.pt", weights_only=True) for path in (ranks, alone))
    for name, gradient in expected.items():
        difference = (found[name].view_as(gradient).float() - gradient.float()).norm()
        assert difference <= 0.01 * gradient.float().norm() + 1e-4, name
    way = moved(runs, tiny_folder)
    assert (masters(ranks) - masters(alone)).norm() <= 0.06 * way
    assert (masters(runs / "bfloat16-perturbed") - masters(alone)).norm() > 0.3 * way


def moved(runs: Path, tiny_folder: Any) -> torch.Tensor:
    """Distance that five steps on one rank move the master weights."""
    start = load_file(tiny_folder("qwen2_vl") / "model.safetensors")
    state = load_file(
        runs / "bfloat16-None" / "checkpoints" / f"step_{STEPS:06d}" / "trainer" / "optimizer.safetensors"
    )
    names = sorted(name.removeprefix("master/") for name in state if name.startswith("master/"))
    before = [start[name.replace("model.language_model", "model").replace("model.visual", "visual")] for name in names]
    return (masters(runs / "bfloat16-None") - torch.cat([part.bfloat16().float().flatten() for part in before])).norm()


def test_two_ranks_train_an_adapter_above_4_bits_as_one(wide_folder: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    names = {None: "alone", "ddp": "ranks"}
    jobs = [
        job(Path(wide_folder()), tmp_path, name, engine, "lora", gradient=str(tmp_path / f"{name}.pt"))
        for engine, name in names.items()
    ]
    for one in jobs:
        one["config"]["model"]["load_in_4bit"] = True
    codes, errors = run(jobs, tmp_path)
    assert codes == {"alone": [0], "ranks": [0, 0]}, errors
    found, expected = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("ranks", "alone"))
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name
    assert distance(weights(tmp_path / "ranks"), weights(tmp_path / "alone")) <= 2e-5


@pytest.mark.parametrize("first", [*ENGINES, *OFFLOADED])
def test_a_run_resumes_under_another_engine(runs: Path, first: str) -> None:
    """Two steps under one engine and three under another, on the same samples in the same order."""
    needs(first)
    for path in runs.glob(f"resumed-{first}-*"):
        assert distance(weights(path), weights(runs / "full-None")) <= 1e-5, path.name
        resume = json.loads((path / "resumes.jsonl").read_text())
        assert any(change.startswith(("engine (", "offload_optimizer_device (")) for change in resume["environment"])
        assert "within rounding" in resume["promise"]
        rewards = [
            [line["reward"] for line in read_metrics(run) if "reward" in line] for run in (path, runs / "full-None")
        ]
        assert rewards[0] == pytest.approx(rewards[1], rel=1e-4)


@pytest.mark.parametrize(
    ("engine", "placement"),
    {
        "zero3": "AdamW, weights offloaded to none",
        "zero2_offload": "DeepSpeedCPUAdam, weights offloaded to none",
        "zero3_offload": "DeepSpeedCPUAdam, weights offloaded to cpu",
    }.items(),
)
def test_what_is_asked_for_is_offloaded(runs: Path, engine: str, placement: str) -> None:
    needs(engine)
    for scenario in ("full", "bfloat16"):
        errors = json.loads((runs / "errors.json").read_text())[f"{scenario}-{engine}"]
        assert errors.count(f"stepped by {placement}\n") == 2
        assert "FutureWarning" not in errors


def test_an_offloaded_optimizer_that_cannot_be_compiled_is_refused(tiny_folder: Any, tmp_path: Path) -> None:
    needs("zero3")
    environment = {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    folder = tiny_folder("qwen2_vl")
    uncompiled = job(folder, tmp_path, "run", "zero3_offload", environment=environment, dry_run=True)
    codes, errors = run([uncompiled], tmp_path)
    assert codes == {"run": [1, 1]}
    assert "ValueError: The launcher offloads the optimizer to the CPU, but DeepSpeed cannot compile its" in errors
    assert "`apt-get install g++ python3-dev ninja-build`" in errors


SEED = int(os.environ.get("LOST_RANKS_SEED") or random.SystemRandom().randrange(10**6))
"""Each test run draws where ranks are lost; a failing test prints the seed."""

LOSSES: dict[str, dict[str, Any]] = {
    "killed-0": {"rank": 0, "how": int(signal.SIGKILL)},
    "killed-1": {"rank": 1, "how": int(signal.SIGKILL)},
    "frozen-1": {"rank": 1, "how": int(signal.SIGSTOP)},
    "stuck-0": {"rank": 0, "how": "stuck"},
    "stuck-1": {"rank": 1, "how": "stuck"},
}


def position(name: str) -> tuple[int, str]:
    """The step, counted from 1, and the phase in which a rank is lost."""
    chosen = random.Random(f"{SEED} {name}")
    return chosen.randint(1, STEPS), chosen.choice(PHASES[1:])


@pytest.fixture(scope="module")
def losses(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, str]]:
    """Folder, exit codes and standard error of runs that lose a rank."""
    tmp, folder = tmp_path_factory.mktemp("losses"), tiny_folder("qwen2_vl")
    jobs = []
    for name, loss in LOSSES.items():
        step, phase = position(name)
        train = {"save_steps": 2, "rank_timeout": 10.0}
        jobs.append(job(folder, tmp, name, "ddp", train=train, lost=loss | {"step": step, "phase": phase}))
    codes, errors = run(jobs, tmp)
    return tmp, codes, sections(errors)


@pytest.mark.parametrize("name", LOSSES)
def test_a_lost_rank_ends_the_run(losses: Any, name: str) -> None:
    """Killed, frozen or stuck: the message names the rank, the position and the last checkpoint, which is complete."""
    tmp, codes, errors = losses
    rank, how, (step, phase) = LOSSES[name]["rank"], LOSSES[name]["how"], position(name)
    print(f"LOST_RANKS_SEED={SEED}: rank {rank} lost in the {phase} of step {step}\n{errors[name]}")
    folder = tmp / name
    if how == "stuck":
        assert codes[name] == [1, 1]
        sentence = f"rank {rank} got stuck in the {phase} of step {step}"
        assert f"(train.rank_timeout): {sentence} while the others wait." in errors[name]
    else:
        assert codes[name][1 - rank] == 1 and codes[name][rank] == -signal.SIGKILL
        sentence = f"Rank {rank} stopped responding"
        assert f"{sentence} in the" in errors[name] or f"{sentence} at the start" in errors[name]
        assert f"of step {step}:" in errors[name] or f"of step {step - 1}:" in errors[name] or step == 1
    # The last whole step is also saved if the main rank sees the connection break before the roll call ends it.
    regular, last = set(range(2, step, 2)), step if phase == "logging" else step - 1
    allowed = [sorted(steps)[-2:] for steps in (regular, regular | {last} - {0})]  # train.save_total_limit is 2
    written = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert [int(name.removeprefix("step_")) for name in written] in allowed
    if written:
        assert f"The last checkpoint is {folder / 'checkpoints' / written[-1]}" in errors[name]
        assert "--gpus 2" in errors[name]
        assert (folder / "checkpoints" / written[-1] / "trainer" / "state.json").is_file()
    else:
        assert "No checkpoint was written yet" in errors[name]
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob(".*.tmp"))
    if rank == 1 or how == "stuck":
        status = json.loads((folder / "status.json").read_text())
        assert status["state"] == "failed" and sentence in status["reason"]
