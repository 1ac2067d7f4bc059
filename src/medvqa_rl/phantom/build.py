"""The recipe of the embedded checkpoints: from random weights to ``base`` and ``instruct``.

    medvqa-rl phantom build --output runs/phantom_build

Four stages, all supervised, on the home scanner only:

1. **Seeing**: the vision tower alone, through a linear probe (:mod:`medvqa_rl.phantom.seeing`).
2. **Binding** (text only): a list of lettered options among random tokens, then words of it whose letters are asked
   for. The context grows as soon as the model answers 95 % right.
3. **Base**: describe the image, or reason and answer in plain text; one in ten answers has the requested form.
4. **Instruct**: reason and answer in the requested form, always.

Data is endless and addressed, so the same seed gives the same weights on the same machine and versions.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from transformers import Qwen2VLForConditionalGeneration

from medvqa_rl.config import DataConfig, EvalConfig, ModelConfig, OptimizerConfig, RolloutConfig
from medvqa_rl.core.answers import parse_completion
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.randomness import Draws, address
from medvqa_rl.core.types import LETTERS, Group, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.questions import draw_sample, full_description
from medvqa_rl.data.phantom.world import ALL_KINDS, ALL_ORGANS, COUNTS, LEVELS, MODALITIES, SIDES, SIZES
from medvqa_rl.evaluation.evaluate import evaluate
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.learning.objective.optimizer import Optimizer, lr_at
from medvqa_rl.learning.sft import sft_loss, target_group
from medvqa_rl.models.checkpoints import atomic_folder, write_model
from medvqa_rl.models.loading import Policy
from medvqa_rl.phantom.seeing import learn_to_see
from medvqa_rl.phantom.vlm import build_model, build_processor
from medvqa_rl.rollout.decode import RolloutEngine

Stage = Literal["base", "instruct"]

FORM_RATE = 0.1
"""Share of the base model's answers that have the requested form, so that reinforcement has something to amplify."""
DESCRIBE_RATE = 0.35
"""Share of the base model's lessons that are descriptions of the image."""
BATCH = 32
STEPS: dict[Stage, int] = {"base": 1400, "instruct": 1000}
STEPS_SEEING = 1000
LEARNING_RATES: dict[str, float] = {"seeing": 2e-3, "binding": 1e-3, "base": 1.5e-3, "instruct": 6e-4}
WORDS = tuple(dict.fromkeys((*MODALITIES, *ALL_ORGANS, *ALL_KINDS, *SIDES, *LEVELS, *SIZES, *COUNTS, "equal")))
_REACH = 60
"""Random tokens between the options and the questions about them, at the end of the binding stage."""

Log = Callable[[dict[str, Any]], None]


def build(output: Path, *, seed: int = 0, steps: Mapping[Stage, int] | None = None, dry_run: bool = False) -> Path:
    """Train both checkpoints and evaluate them on both scanners.

    Args:
        output: gets ``base`` and ``instruct`` (model folders, bfloat16), ``build.jsonl`` (curves) and ``build.json``
            (accuracy of both on both scanners).
        steps: optimizer steps of the stages ``base`` and ``instruct``; None takes the recipe's.
        dry_run: show the shapes of one step of each kind and stop; nothing is written.

    Raises:
        ValueError: the output folder holds something already.
    """
    if not dry_run and output.exists() and any(output.iterdir()):
        raise ValueError(f"The folder {output} is not empty: name another with --output, or remove it.")
    processor = build_processor()
    model = build_model(processor, seed)
    policy = Policy(model, processor, torch.device("cpu"), ModelConfig(train_vision=True, train_projector=True))
    if dry_run:
        _show_one_step(policy, seed)
        return output
    output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    def log(row: dict[str, Any]) -> None:
        row = row | {"seconds": round(time.perf_counter() - began, 1)}
        with (output / "build.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            "  ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )

    results: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    learn_to_see(policy, STEPS_SEEING, LEARNING_RATES["seeing"], seed, log)
    learn_binding(policy, seed, log)
    for stage in STEPS:
        learn(policy, stage, steps[stage] if steps else STEPS[stage], seed, log)
        save(policy, output / stage)
        results[stage] = examine(policy, stage)
        log({"stage": stage, **results[stage]})
    results["seconds"] = round(time.perf_counter() - began)
    (output / "build.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return output


def _show_one_step(policy: Policy, seed: int) -> None:
    """Print sizes and shapes of one step of each kind."""
    print(f"{sum(parameter.numel() for parameter in policy.model.parameters()):,} parameters, {STEPS} steps")
    ids, at = Binding(policy, seed).draw(64, 8, _REACH, use_words=True)
    print(f"binding: {tuple(ids.shape)} rows x tokens, letters at {at.tolist()}")
    for stage in STEPS:
        batch = collate(_lesson_groups(policy, stage, seed, 0), policy.processor, policy.device, layout="separate")
        loss = sft_loss(GroupForward(policy.model), batch)
        loss.backward()
        print(f"{stage}: {tuple(batch.input_ids.shape)} rows x tokens, {len(batch.targets)} targets, loss {loss:.3f}")


class Binding:
    """Practice in binding options to their letters: endless token sequences."""

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

    def draw(self, count: int, options: int, reach: int, *, use_words: bool) -> tuple[Tensor, Tensor]:
        """Noise, a list of options ("\\nA: cyst"), noise, and six questions (" cyst" -> " A").

        Returns:
            (count, T) token ids, and (6,) the positions of the letters to predict.
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
        ids = torch.cat([noise(reach * 2 // 3), listed.flatten(1), noise(reach), questions.flatten(1)], dim=1)
        return ids, ids.shape[1] - 3 * queries + 1 + 3 * torch.arange(queries)

    def loss(self, model: Qwen2VLForConditionalGeneration, ids: Tensor, at: Tensor) -> tuple[Tensor, float]:
        """Cross-entropy of the letters, and the share that is right."""
        text = model.model.language_model
        positions = torch.arange(ids.shape[1]).expand(3, len(ids), -1)
        hidden = text(inputs_embeds=text.embed_tokens(ids), position_ids=positions, use_cache=False).last_hidden_state
        logits, targets = model.lm_head(hidden[:, at - 1]).flatten(0, 1), ids[:, at].flatten()
        return functional.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean().item()


def learn_binding(policy: Policy, seed: int, log: Log, *, max_steps: int = 3000) -> None:
    """Practise until 95 % of the letters are right at the full reach."""
    rate = LEARNING_RATES["binding"]
    optimizer = Optimizer(policy.model, OptimizerConfig(learning_rate=rate, weight_decay=0.05, betas=(0.9, 0.98)))
    practice, reach, recent = Binding(policy, seed), 0, deque[float](maxlen=25)
    for step in range(max_steps):
        ids, at = practice.draw(64, (2, 3, 4, 4)[step % 4], reach, use_words=step % 4 < 3)
        loss, accuracy = practice.loss(policy.model, ids, at)  # type: ignore[arg-type]
        loss.backward()
        clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step(rate * min(1.0, (step + 1) / 50))
        recent.append(accuracy)
        if (step + 1) % 25 == 0:
            mean = sum(recent) / len(recent)
            log({"stage": "binding", "step": step + 1, "reach": reach, "loss": loss.item(), "accuracy": mean})
            if mean > 0.95 and reach >= _REACH:
                return
            reach += 20 if mean > 0.95 else 0
    raise RuntimeError(f"Binding was not learned in {max_steps} steps: try another seed.")


def lesson(stage: Stage, seed: int, index: int) -> tuple[Sample, str]:
    """A sample and what the model shall say: a pure function of its arguments."""
    sample = draw_sample(seed=seed, split=f"build {stage}", index=index)
    if stage == "instruct":
        return sample, render_answer(sample.reasoning, sample.answer)
    draws = Draws("phantom lesson", seed, index)
    if draws.chance(DESCRIBE_RATE):
        image = sample.images[0]
        assert isinstance(image, PhantomImage)
        question = Sample(sample.id, "Describe the image.", "", "open", sample.images)
        return question, full_description(image.scene)
    has_form = draws.chance(FORM_RATE)
    return sample, render_answer(sample.reasoning, sample.answer) if has_form else sample.reasoning


def learn(policy: Policy, stage: Stage, steps: int, seed: int, log: Log) -> None:
    """One stage of supervised fine-tuning, with a little binding practice so that it stays."""
    settings = OptimizerConfig(
        learning_rate=LEARNING_RATES[stage],
        lr_scheduler_type="cosine",
        min_lr_ratio=0.05,
        warmup_steps=min(100, steps // 4),
        weight_decay=0.05,
        betas=(0.9, 0.98),
    )
    optimizer, forward, practice = (
        Optimizer(policy.model, settings),
        GroupForward(policy.model),
        Binding(policy, seed + 1),
    )
    policy.model.train()
    recent, began = deque[float](maxlen=50), time.perf_counter()
    for step in range(steps):
        groups = _lesson_groups(policy, stage, seed, step)
        loss = sft_loss(forward, collate(groups, policy.processor, policy.device, layout="separate"))
        recent.append(loss.item())
        if step % 8 == 0:
            ids, at = practice.draw(BATCH, 4, _REACH, use_words=True)
            loss = loss + practice.loss(policy.model, ids, at)[0]  # type: ignore[arg-type]
        loss.backward()
        clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step(lr_at(step, settings, steps))
        if (step + 1) % 50 == 0:
            left = (time.perf_counter() - began) / (step + 1) * (steps - step - 1)
            log(
                {
                    "stage": stage,
                    "step": step + 1,
                    "of": steps,
                    "loss": sum(recent) / len(recent),
                    "minutes left": left / 60,
                }
            )


def _lesson_groups(policy: Policy, stage: Stage, seed: int, step: int) -> list[Group]:
    """The lessons of one step as groups of one completion."""
    lessons = [lesson(stage, seed, step * BATCH + index) for index in range(BATCH)]
    return [target_group(sample, text, policy.processor, "think_answer") for sample, text in lessons]


def save(policy: Policy, folder: Path) -> None:
    """Write a checkpoint in bfloat16, and go on with the rounded weights, which are what others will load."""
    with atomic_folder(folder) as temporary:
        write_model(Policy(policy.model.to(torch.bfloat16), policy.processor, policy.device, policy.config), temporary)
    policy.model.to(torch.float32)


def examine(policy: Policy, stage: Stage, count: int = 400) -> dict[str, Any]:
    """Greedy accuracy on both scanners, and what sampling shows: how often the form is met, how often a group of
    eight has both right and wrong answers."""
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
