"""The recipe for the embedded checkpoints: from random weights to ``base`` and ``instruct``.

    medvqa-rl phantom build --output runs/phantom_build

Four supervised stages, on the home scanner only:

1. **Seeing**: train the vision tower alone, through a linear probe (:mod:`medvqa_rl.phantom.seeing`).
2. **Binding** (text only): given a list of lettered options among random tokens, predict the letters of some of the
   options. The context grows each time the model reaches 95 % accuracy.
3. **Base**: describe the image, or reason and answer in plain text; one answer in ten has the requested format.
4. **Instruct**: always reason and answer in the requested format.

Training data is endless. The same seed gives the same weights on the same machine and package versions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from medvqa_rl.config import DataConfig, EvalConfig, ModelConfig, OptimizerConfig, RolloutConfig
from medvqa_rl.core.answers import parse_completion
from medvqa_rl.core.files import write_json
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.randomness import Draws, address
from medvqa_rl.core.text import shown
from medvqa_rl.core.types import LETTERS, Group, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.questions import draw_sample, full_description
from medvqa_rl.data.phantom.world import ALL_KINDS, ALL_ORGANS, COUNTS, LEVELS, MODALITIES, SIDES, SIZES
from medvqa_rl.evaluation.evaluate import evaluate
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.learning.objective.optimizer import Optimizer
from medvqa_rl.learning.sft import sft_loss, target_completion
from medvqa_rl.models.checkpoints import atomic_folder, write_model
from medvqa_rl.models.families import shared_family_of
from medvqa_rl.models.families.parts import Embedded
from medvqa_rl.models.loading import Policy
from medvqa_rl.phantom.architectures import PHANTOMS
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
STEPS: dict[Stage, int] = {"base": 1400, "instruct": 1000}
STEPS_SEEING = 1000
LEARNING_RATES: dict[str, float] = {"seeing": 2e-3, "binding": 1e-3, "base": 1.5e-3, "instruct": 6e-4}
WORDS = tuple(dict.fromkeys((*MODALITIES, *ALL_ORGANS, *ALL_KINDS, *SIDES, *LEVELS, *SIZES, *COUNTS, "equal")))
_MAX_DISTANCE = 60
"""Maximum number of random tokens between the options and their queries at the end of the binding stage."""


def build(
    output: Path,
    *,
    family: str = "qwen2_vl",
    seed: int = 0,
    steps: Mapping[Stage, int] | None = None,
    dry_run: bool = False,
) -> Path:
    """Train both checkpoints and evaluate them on both scanners.

    Args:
        output: folder for ``base`` and ``instruct`` (model folders, bfloat16), ``build.jsonl`` (learning curves) and
            ``build.json`` (accuracy of both on both scanners).
        family: ``model_type`` of the architecture, one of :data:`PHANTOMS`.
        seed: seed of weights and data.
        steps: number of optimizer steps of the stages ``base`` and ``instruct``; defaults to :data:`STEPS`.
        dry_run: print the shapes of one step of each kind and stop; nothing is written.

    Raises:
        ValueError: the family is unknown, or the output folder is not empty.
    """
    if family not in PHANTOMS:
        raise ValueError(f"--family is {shown(family)}, but the families are {', '.join(PHANTOMS)}.")
    if not dry_run and output.exists() and any(output.iterdir()):
        raise ValueError(f"The folder {output} is not empty: choose another with --output, or remove it.")
    processor = build_processor(family)
    model = build_model(processor, seed)
    policy = Policy(model, processor, torch.device("cpu"), ModelConfig(train_vision=True, train_projector=True))
    if dry_run:
        _show_one_step(policy, seed)
        return output
    output.mkdir(parents=True, exist_ok=True)
    began, log = time.perf_counter(), curve_log(output / "build.jsonl")
    results: dict[str, Any] = {"family": family, "parameters": count_parameters(model)}
    learn_to_see(policy, STEPS_SEEING, LEARNING_RATES["seeing"], seed, log)
    learn_binding(policy, seed, log)
    for stage in STEPS:
        learn(policy, stage, steps[stage] if steps else STEPS[stage], seed, log)
        save(policy, output / stage)
        results[stage] = examine(policy, stage)
        log({"stage": stage, **results[stage]})
    results["seconds"] = round(time.perf_counter() - began)
    write_json(output / "build.json", results)
    return output


def _show_one_step(policy: Policy, seed: int) -> None:
    """Print the shapes of one step of each kind."""
    print(f"{count_parameters(policy.model):,} parameters, {STEPS} steps")
    ids, positions = Binding(policy, seed).draw(64, 8, _MAX_DISTANCE, use_words=True)
    print(f"binding: {tuple(ids.shape)} rows x tokens, letters at {positions.tolist()}")
    for stage in STEPS:
        batch = collate(
            _lesson_groups(policy, stage, seed, 0), policy.processor, policy.device, layout=Layout.SEPARATE
        )
        loss = sft_loss(GroupForward(policy.model), batch)
        loss.backward()
        print(f"{stage}: {tuple(batch.input_ids.shape)} rows x tokens, {len(batch.targets)} targets, loss {loss:.3f}")


class Binding:
    """Endless token sequences that train the binding of options to their letters."""

    def __init__(self, policy: Policy, seed: int) -> None:
        tokenizer = policy.processor.tokenizer

        def token(text: str) -> int:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == 1, f"{text!r} is {len(ids)} tokens"
            return int(ids[0])

        self._generator = torch.Generator().manual_seed(address("phantom binding", seed) >> 1)
        self._words = torch.tensor([token(f" {word}") for word in WORDS])
        self._any = torch.arange(tokenizer.vocab_size)
        self._line, self._colon, self._stop = token("\n"), token(":"), token(".")
        self._before = torch.tensor([token(letter) for letter in LETTERS[:8]])
        self._after = torch.tensor([token(f" {letter}") for letter in LETTERS[:8]])

    def draw(self, count: int, options: int, distance: int, *, use_words: bool) -> tuple[Tensor, Tensor]:
        """Sequences of noise, a list of options ("\\nA: cyst"), noise, and six queries (" cyst" -> " A").

        Args:
            count: number of sequences.
            options: number of options in a list.
            distance: maximum number of noise tokens between the list and the queries.
            use_words: take options from the words of the phantom world rather than from all tokens.

        Returns:
            (count, T) token ids, and (6,) positions of the letters to predict.
        """
        queries = 6
        generator, pool = self._generator, self._words if use_words else self._any

        def noise(limit: int) -> Tensor:
            length = int(torch.randint(0, limit + 1, (1,), generator=generator))
            return torch.randint(0, len(self._any), (count, length), generator=generator)

        def column(token: int, width: int) -> Tensor:
            return torch.full((count, width), token)

        named = pool[torch.rand(count, len(pool), generator=generator).argsort(dim=1)[:, :options]]
        letters = self._before[:options].expand(count, -1)
        listed = torch.stack([column(self._line, options), letters, column(self._colon, options), named], dim=-1)
        asked = torch.randint(options, (count, queries), generator=generator)
        answers = self._after[asked]
        questions = torch.stack([named.gather(1, asked), answers, column(self._stop, queries)], dim=-1)
        ids = torch.cat([noise(distance * 2 // 3), listed.flatten(1), noise(distance), questions.flatten(1)], dim=1)
        return ids, ids.shape[1] - 3 * queries + 1 + 3 * torch.arange(queries)

    def loss(self, model: nn.Module, ids: Tensor, positions: Tensor) -> tuple[Tensor, float]:
        """Cross-entropy of the letters, and the share predicted correctly."""
        family = shared_family_of(model)
        position_ids = torch.arange(ids.shape[1]).expand(family.num_axes, len(ids), -1)
        embedded = Embedded(family.text(model).embed_tokens(ids), {})
        hidden = family.hidden_states(model, embedded, position_ids, use_cache=False)
        logits = family.logits(model, hidden[:, positions - 1]).flatten(0, 1)
        targets = ids[:, positions].flatten()
        return functional.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean().item()


def learn_binding(policy: Policy, seed: int, log: Log, *, max_steps: int = 3000) -> None:
    """Train until 95 % of the letters are predicted correctly at the maximum distance."""
    rate = LEARNING_RATES["binding"]
    optimizer = Optimizer(policy.model, OptimizerConfig(learning_rate=rate, weight_decay=0.05, betas=(0.9, 0.98)))
    practice, distance, recent = Binding(policy, seed), 0, deque[float](maxlen=25)
    for step in range(max_steps):
        ids, positions = practice.draw(64, (2, 3, 4, 4)[step % 4], distance, use_words=step % 4 < 3)
        loss, accuracy = practice.loss(policy.model, ids, positions)
        loss.backward()
        clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step(rate * min(1.0, (step + 1) / 50))
        recent.append(accuracy)
        if (step + 1) % 25 == 0:
            mean = sum(recent) / len(recent)
            log({"stage": "binding", "step": step + 1, "distance": distance, "loss": loss.item(), "accuracy": mean})
            if mean > 0.95 and distance >= _MAX_DISTANCE:
                return
            distance += 20 if mean > 0.95 else 0
    raise RuntimeError(f"Binding was not learned in {max_steps} steps: try another seed.")


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


def learn(policy: Policy, stage: Stage, steps: int, seed: int, log: Log) -> None:
    """Run one stage of supervised fine-tuning, mixed with some binding data so that binding is not forgotten."""
    forward, practice = GroupForward(policy.model), Binding(policy, seed + 1)

    def backward(step: int) -> dict[str, float]:
        groups = _lesson_groups(policy, stage, seed, step)
        loss = sft_loss(forward, collate(groups, policy.processor, policy.device, layout=Layout.ROWS))
        values = {"loss": loss.item()}
        if step % 8 == 0:
            ids, positions = practice.draw(BATCH, 4, _MAX_DISTANCE, use_words=True)
            loss = loss + practice.loss(policy.model, ids, positions)[0]
        loss.backward()
        return values

    policy.model.train()
    settings = cosine_schedule(LEARNING_RATES[stage], warmup_steps=min(100, steps // 4), min_lr_ratio=0.05)
    train(policy.model, settings, steps, backward, log, stage=stage)


def _lesson_groups(policy: Policy, stage: Stage, seed: int, step: int) -> list[Group]:
    """The samples of one step, as groups with one completion each."""
    lessons = [lesson(stage, seed, step * BATCH + index) for index in range(BATCH)]
    processor = policy.processor
    groups = []
    for sample, text in lessons:
        prompt = processor.encode(sample, "think_answer")
        groups.append(Group(sample, prompt, (target_completion(text, prompt, processor),)))
    return groups


def save(policy: Policy, folder: Path) -> None:
    """Save a checkpoint in bfloat16 and continue with the rounded weights, which are what users load."""
    with atomic_folder(folder) as temporary:
        write_model(Policy(policy.model.to(torch.bfloat16), policy.processor, policy.device, policy.config), temporary)
    policy.model.to(torch.float32)


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
