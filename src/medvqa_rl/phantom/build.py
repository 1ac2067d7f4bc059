"""The recipe for the embedded checkpoints: from random weights to ``base`` and ``instruct``.

    medvqa-rl phantom build --output runs/phantom_build
    medvqa-rl phantom build --size large --output runs/phantom_large

Four supervised stages, on the home scanner only:

1. **Seeing**: train the vision tower alone, through a linear probe (:mod:`medvqa_rl.phantom.seeing`).
2. **Binding** (text only): given a list of lettered options among random tokens, predict the letters of some of the
   options (:mod:`medvqa_rl.phantom.binding`).
3. **Base**: describe the image, or reason and answer in plain text; one answer in ten has the requested format.
4. **Instruct**: always reason and answer in the requested format.

Training data is endless. The same seed gives the same weights on the same machine and package versions.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_model, save_model

from medvqa_rl.config import DataConfig, EvalConfig, ModelConfig, RolloutConfig
from medvqa_rl.config.schema import did_you_mean
from medvqa_rl.core.answers import parse_completion
from medvqa_rl.core.files import read_json, write_json, write_whole
from medvqa_rl.core.machine import ProcessLock
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.text import shown
from medvqa_rl.core.types import Group, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.questions import draw_sample, full_description
from medvqa_rl.evaluation.evaluate import evaluate
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.learning.sft import sft_loss, target_completion
from medvqa_rl.models.checkpoints import atomic_folder, write_model
from medvqa_rl.models.loading import Policy
from medvqa_rl.phantom.architectures import DIMENSIONS, PHANTOMS
from medvqa_rl.phantom.binding import MAX_DISTANCE, Binding, learn_binding
from medvqa_rl.phantom.seeing import learn_to_see
from medvqa_rl.phantom.training import Log, cosine_schedule, count_parameters, curve_log, train
from medvqa_rl.phantom.vlm import build_model, build_processor
from medvqa_rl.rollout.decode import RolloutEngine

Stage = Literal["base", "instruct"]

FORMAT_RATE = 0.1
"""Share of the base model's answers in the requested format, so that RL has something to amplify."""
DESCRIBE_RATE = 0.35
"""Share of the base model's training samples that ask for a description of the image."""
BATCH = 32
STAGES: tuple[Stage, ...] = ("base", "instruct")
STEPS_SEEING = 1000
LEARNING_RATES: dict[str, float] = {"seeing": 2e-3, "binding": 1e-3, "base": 1.5e-3, "instruct": 6e-4}


def build(
    output: Path,
    *,
    family: str = "qwen2_vl",
    size: str = "base",
    seed: int = 0,
    steps: Mapping[Stage, int | None] | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> Path:
    """Train both checkpoints and evaluate them on both scanners.

    Args:
        output: folder for ``base`` and ``instruct`` (model folders, bfloat16), ``build.jsonl`` (learning curves) and
            ``build.json`` (accuracy of both on both scanners and the seconds since the last start; written last).
        family: ``model_type`` of the architecture, one of :data:`PHANTOMS`.
        size: one of :data:`DIMENSIONS`, which sets dimensions and the factor of the learning rates.
        seed: seed of weights and data.
        steps: number of optimizer steps of the stages ``base`` and ``instruct``; None takes those of the size.
        resume: continue an interrupted build, with the same weights as an uninterrupted one: at most 50 steps are
            repeated. Starts one if there is none.
        dry_run: print the shapes of one step of each kind and stop; nothing is written.

    Raises:
        ValueError: the family or size is unknown, the output folder is not empty, or another process builds in it.
    """
    if family not in PHANTOMS:
        raise ValueError(f"--family is {shown(family)}, but the families are {', '.join(PHANTOMS)}.")
    if size not in DIMENSIONS:
        raise ValueError(
            f"--size is {shown(size)}, but the sizes are {', '.join(DIMENSIONS)}"
            + (did_you_mean(size, DIMENSIONS) or ".")
        )
    if not dry_run and not resume and output.exists() and any(output.iterdir()):
        raise ValueError(
            f"The folder {output} is not empty: choose another with --output, remove it, or continue the build in it "
            "with --resume."
        )
    planned: dict[Stage, int] = {"base": DIMENSIONS[size].base_steps, "instruct": DIMENSIONS[size].instruct_steps}
    planned |= {stage: count for stage, count in (steps or {}).items() if count is not None}
    processor = build_processor(family)
    model = build_model(processor, seed, size)
    policy = Policy(model, processor, torch.device("cpu"), ModelConfig(train_vision=True, train_projector=True))
    settings = {"family": family, "size": size, "seed": seed, "steps": planned, "parameters": count_parameters(model)}
    if dry_run:
        _show_one_step(policy, seed, planned)
        return output
    lock = ProcessLock(output / ".lock")
    lock.acquire(f"builds a model in {output}: wait for it, or choose another folder with --output.")
    try:
        _refuse_other_settings(output / "settings.json", settings)
        if (output / "build.json").is_file():
            print(f"The build in {output} is finished.")
            return output
        log, began, rate = curve_log(output / "build.jsonl"), time.perf_counter(), DIMENSIONS[size].rate
        results: dict[str, Any] = dict(settings)
        with _stage(policy, output, "seeing") as kept:
            if kept:
                learn_to_see(policy, STEPS_SEEING, rate * LEARNING_RATES["seeing"], seed, log, kept=kept)
        with _stage(policy, output, "binding") as kept:
            if kept:
                learn_binding(policy, seed, log, rate=rate * LEARNING_RATES["binding"], kept=kept)
        for stage in STAGES:
            with _stage(policy, output, stage) as kept:
                if kept:
                    learn(policy, stage, planned[stage], seed, log, rate=rate * LEARNING_RATES[stage], kept=kept)
                    save(policy, output / stage)
            results[stage] = examine(policy, stage)
            log({"stage": stage, **results[stage]})
        results["seconds"] = round(time.perf_counter() - began)
        write_json(output / "build.json", results)
        shutil.rmtree(output / "stages")
    finally:
        lock.release()
    return output


def _refuse_other_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of a build, or compare them with those recorded.

    Raises:
        ValueError: the build was started with other settings.
    """
    if not path.is_file():
        write_json(path, settings)
        return
    remedy = f"remove the folder {path.parent} to build again"
    before = read_json(TypeAdapter(dict[str, Any]), path, remedy)
    if changed := [name for name, value in settings.items() if before.get(name) != value]:
        raise ValueError(
            f"The build in {path.parent} was started with {changed[0]} {before.get(changed[0])}, but it is now "
            f"{settings[changed[0]]}: {remedy}, or choose another folder with --output."
        )


@contextmanager
def _stage(policy: Policy, output: Path, name: str) -> Iterator[Path | None]:
    """Yield where a stage keeps its state, and store the weights after it; a finished one yields None and is loaded.

    Every stage has its own optimizer and data, so nothing but weights is carried over.
    """
    path, kept = (output / "stages" / f"{name}{kind}.safetensors" for kind in ("", ".kept"))
    if path.is_file():
        load_model(policy.model, path)
        yield None
        return
    yield kept
    with write_whole(path) as temporary:
        save_model(policy.model, str(temporary))
    kept.unlink(missing_ok=True)


def _show_one_step(policy: Policy, seed: int, steps: Mapping[Stage, int]) -> None:
    """Print the shapes of one step of each kind."""
    print(f"{count_parameters(policy.model):,} parameters, {dict(steps)} steps")
    ids, positions = Binding(policy, seed).draw(64, 8, MAX_DISTANCE, use_words=True)
    print(f"binding: {tuple(ids.shape)} rows x tokens, letters at {positions.tolist()}")
    for stage in STAGES:
        batch = collate(
            _lesson_groups(policy, stage, seed, 0), policy.processor, policy.device, layout=Layout.SEPARATE
        )
        loss = sft_loss(GroupForward(policy.model), batch)
        loss.backward()
        print(f"{stage}: {tuple(batch.input_ids.shape)} rows x tokens, {len(batch.targets)} targets, loss {loss:.3f}")


def lesson(stage: Stage, seed: int, index: int) -> tuple[Sample, str]:
    """A sample and its target completion; a pure function of the arguments."""
    sample = draw_sample(seed=seed, split=f"build {stage}", index=index)
    if stage == "instruct":
        return sample, render_answer(sample.reasoning, sample.answer)
    draws = Draws("phantom lesson", seed, index)
    if draws.chance(DESCRIBE_RATE):
        image = sample.images[0]
        assert isinstance(image, PhantomImage)
        question = Sample(sample.id, "Describe the image.", "", "open", sample.images)
        return question, full_description(image.scene)
    has_format = draws.chance(FORMAT_RATE)
    return sample, render_answer(sample.reasoning, sample.answer) if has_format else sample.reasoning


def learn(
    policy: Policy,
    stage: Stage,
    steps: int,
    seed: int,
    log: Log,
    *,
    rate: float | None = None,
    kept: Path | None = None,
) -> None:
    """Run one stage of supervised fine-tuning, mixed with some binding data so that binding is not forgotten.

    Args:
        rate: peak learning rate; None takes that of the size base.
        kept: see :func:`~medvqa_rl.phantom.training.train`.
    """
    forward, practice = GroupForward(policy.model), Binding(policy, seed + 1)

    def backward(step: int) -> dict[str, float]:
        groups = _lesson_groups(policy, stage, seed, step)
        loss = sft_loss(forward, collate(groups, policy.processor, policy.device, layout=Layout.ROWS))
        values = {"loss": loss.item()}
        if step % 8 == 0:
            ids, positions = practice.draw(BATCH, 4, MAX_DISTANCE, use_words=True)
            loss = loss + practice.loss(policy.model, ids, positions)[0]
        loss.backward()
        return values

    policy.model.train()
    settings = cosine_schedule(rate or LEARNING_RATES[stage], warmup_steps=min(100, steps // 4), min_lr_ratio=0.05)
    train(policy.model, settings, steps, backward, log, kept=kept, generator=practice.generator, stage=stage)


def _lesson_groups(policy: Policy, stage: Stage, seed: int, step: int) -> list[Group]:
    """The samples of one step, as groups with one completion each."""
    lessons = [lesson(stage, seed, step * BATCH + index) for index in range(BATCH)]
    processor = policy.processor
    groups = []
    for sample, text in lessons:
        prompt = processor.encode(sample, "think_answer")
        groups.append(Group(sample, prompt, (target_completion(text, prompt, processor),)))
    return groups


@torch.no_grad()
def save(policy: Policy, folder: Path) -> None:
    """Save a checkpoint in bfloat16 and continue with the rounded weights, which are what users load.

    Only weights are rounded: a checkpoint does not hold the frequencies of rotary embeddings, so who loads it has the
    exact ones.
    """
    with atomic_folder(folder) as temporary:
        stored = copy.deepcopy(policy.model).to(torch.bfloat16)
        write_model(Policy(stored, policy.processor, policy.device, policy.config), temporary)
    for parameter in policy.model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))


def examine(policy: Policy, stage: Stage, count: int = 400) -> dict[str, Any]:
    """Greedy accuracy on both scanners, and the share of sampled completions in the requested format."""
    engine = RolloutEngine(policy, "think_answer")
    results: dict[str, Any] = {}
    for scanner in ("home", "unseen"):
        dataset = load_dataset(DataConfig(scanner=scanner, num_test=count), "test")
        evaluation = evaluate(
            engine, dataset, EvalConfig(bootstrap=200), max_completion_length=128, template="think_answer"
        )
        for kind in ("choice", "closed", "open"):
            right = [record.is_correct for record in evaluation.records if record.answer_type == kind]
            results[f"{scanner}/{kind}"] = sum(bool(value) for value in right) / len(right)
        families: dict[str, list[bool]] = {}
        for record in evaluation.records:
            if record.answer_type == "choice":
                families.setdefault(record.groups["family"], []).append(bool(record.is_correct))
        results[f"{scanner}/choice by family"] = {name: sum(v) / len(v) for name, v in sorted(families.items())}
        groups = engine.rollout(
            [dataset[index] for index in range(0, count, 4)],
            RolloutConfig(max_completion_length=128),
            seed=0,
            stream="eval",
            step=0,
        )
        formed = [parse_completion(c.text).is_well_formed for group in groups for c in group.completions]
        results[f"{scanner}/sampled format rate"] = sum(formed) / len(formed)
    return results
