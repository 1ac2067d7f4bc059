"""The recipe of the embedded judges: small BioGPT models that say Yes to coherent reasoning of the phantom world.

    medvqa-rl phantom build-judges --output runs/judges

A judge reads a reasoning and nothing else, and its next token is " Yes" or " No". It is trained on the verdict at the
end of every sentence, not of the last one only: the label of a text that breaks off there. That tells it where a
reasoning went wrong, and is many times the signal for the same work. The labels are those of
:func:`medvqa_rl.data.phantom.claims.is_coherent`, which knows the world's rules but not the image.

The texts are references, changed and damaged ones (:mod:`reasonings`) and texts that the embedded
policies sampled. Data is addressed, so the same seed gives the same weights on the same machine and versions.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import BioGptConfig, BioGptForCausalLM, PreTrainedTokenizerFast

from medvqa_rl.config import JudgeConfig, ModelConfig, OptimizerConfig, RolloutConfig
from medvqa_rl.core.answers import parse_completion
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.data.phantom.reasonings import Reasoning, draw_reasoning
from medvqa_rl.learning.objective.optimizer import Optimizer, lr_at
from medvqa_rl.models.checkpoints import atomic_folder
from medvqa_rl.models.loading import load_policy
from medvqa_rl.phantom.judge_lessons import POSITIONS, Lessons, Probes, Recipe, lesson_loss
from medvqa_rl.rewards.judges import JudgeRequest
from medvqa_rl.rewards.judges.local import load_local_judge
from medvqa_rl.rollout.decode import RolloutEngine

PAD, END = "<pad>", "</s>"
TEMPERATURES = (1.0, 1.15, 1.3)
"""Of the texts that the policies sample, a third each."""
SAMPLED = 3000
"""Texts that the policies sample for the training of each judge."""

_STRENGTH = 2.0
"""Of the queries and keys that look back."""

Log = Callable[[dict[str, Any]], None]


RECIPES = (
    Recipe("judge", 0, 96, 4, 6, 288, "broad", 0.35, 2600, 3e-3),
    Recipe("judge_eval", 1, 80, 5, 5, 240, "damaged", 0.5, 2600, 3e-3),
)
"""The judge that rewards and the one that evaluates: other seed, size, data and share of sampled texts."""


def build_tokenizer(vocab_size: int = 560) -> PreTrainedTokenizerFast:
    """Byte-level BPE of phantom reasonings, in which " Yes" and " No" are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [draw_reasoning(0, "tokenizer", index).text for index in range(4000)]
    tokenizer.train_from_iterator([*texts, *["? Yes", "? No"] * 500], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, END)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=POSITIONS
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> BioGptForCausalLM:
    """A judge with random weights, float32, prepared to compare words (:func:`_prepare_for_comparing`)."""
    torch.manual_seed(recipe.seed)
    config = BioGptConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.inner,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layerdrop=0.0,
        activation_dropout=0.0,
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    model = BioGptForCausalLM(config)
    _prepare_for_comparing(model, recipe)
    return model


@torch.no_grad()
def _prepare_for_comparing(model: Any, recipe: Recipe) -> None:
    """Start as a model that knows which tokens stand before a word, and where the word stood earlier.

    Contradictions and repetitions are about words that come twice in different company. From a usual start the heads
    that find company and those that find the word again must both be there before either helps. So as many of the
    hidden numbers as a head is wide begin as sines and cosines of the position and nothing else; half the heads of
    layer 0 read them, turned by an angle for each step back, and so look 1, 2 ... tokens back; half the heads of the
    layers above begin with equal projections of queries and keys, so that a token attends to its like, and with a
    dislike of where it stands itself. All of it is trained on from there.
    """
    width = recipe.hidden // recipe.heads
    half = width // 2
    frequency = 100.0 ** (-torch.arange(half) / half)  # from one radian a token to a full turn in some 600
    angle = torch.arange(POSITIONS + 2)[:, None] * frequency
    body = model.biogpt
    body.embed_positions.weight.normal_(0, 0.01)
    body.embed_positions.weight[:, :width] = torch.cat([angle.sin(), angle.cos()], dim=1)
    body.embed_tokens.weight[:, :width] = 0.0
    for number, layer in enumerate(body.layers):
        attention = layer.self_attn
        for head in range(recipe.heads // 2):
            rows = slice(head * width, (head + 1) * width)
            if number > 0:
                query, key = attention.q_proj.weight[rows], attention.k_proj.weight[rows]
                query *= 3.0
                query[:, :width] = 0.0
                key.copy_(query)
                # Two fast frequencies with opposite signs: as unlike as can be at distance 0, the word itself.
                query[-4:], key[-4:] = 0.0, 0.0
                for row, column in zip(range(-4, 0), (0, half, 1, half + 1)):
                    query[row, column], key[row, column] = 1.0, -1.0
                continue
            # q . k = strength * sum over f of cos(f * (distance - steps)), largest at this distance
            turn = (head + 1) * frequency
            attention.q_proj.weight[rows] = 0.0
            attention.k_proj.weight[rows] = 0.0
            for pair in range(half):
                sin, cos = pair, half + pair
                attention.q_proj.weight[rows][sin, sin] = attention.q_proj.weight[rows][cos, cos] = _STRENGTH
                attention.k_proj.weight[rows][sin, sin] = attention.k_proj.weight[rows][cos, cos] = (
                    _STRENGTH * turn[pair].cos()
                )
                attention.k_proj.weight[rows][sin, cos] = _STRENGTH * turn[pair].sin()
                attention.k_proj.weight[rows][cos, sin] = -_STRENGTH * turn[pair].sin()


def sample_texts(count: int, seed: int, split: str) -> list[Reasoning]:
    """Reasoning that the embedded policies sample, half each, on both scanners, at :data:`TEMPERATURES`.

    Of an answer without a think section the whole text is taken where it has no tags: the base model reasons in plain
    text. Four completions for each question.
    """
    texts: list[Reasoning] = []
    for number, name in enumerate(("instruct", "base")):
        engine = RolloutEngine(load_policy(ModelConfig(path=f"phantom:{name}", device="cpu")))
        for turn, temperature in enumerate(TEMPERATURES):
            size = -(-count // (4 * 2 * len(TEMPERATURES)))
            samples = [
                draw_sample(
                    seed=seed,
                    split=f"judged {split} {name} {turn}",
                    index=index,
                    scanner=("home", "unseen")[index % 2],
                )
                for index in range(size)
            ]
            rollout = RolloutConfig(num_generations=4, max_completion_length=128, temperature=temperature)
            groups = engine.rollout(samples, rollout, seed=seed, stream="eval", step=number * 10 + turn)
            for group in groups:
                for completion in group.completions:
                    think = parse_completion(completion.text).think
                    text = completion.text.strip() if think is None and "<" not in completion.text else think
                    if text:
                        texts.append(Reasoning(group.sample, text, f"sampled from {name} at {temperature:g}"))
    return texts


def learn(model: Any, lessons: Lessons, recipe: Recipe, steps: int, log: Log) -> None:
    """Train the model, its probes along with it."""
    settings = OptimizerConfig(
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        min_lr_ratio=0.02,
        warmup_steps=min(50, steps // 4),
        weight_decay=0.05,
        betas=(0.9, 0.98),
    )
    probes = Probes(recipe.hidden, recipe.seed)
    both = nn.ModuleDict({"model": model, "probes": probes})
    optimizer = Optimizer(both, settings)
    both.train()
    recent, right, began = deque[float](maxlen=50), deque[float](maxlen=50), time.perf_counter()
    for step in range(steps):
        batches = lessons.batches(lessons.texts(step))
        count = sum(len(batch.label) for batch in batches)
        total, hits = 0.0, 0
        for batch in batches:
            loss, some = lesson_loss(model, probes, batch, lessons.answers)
            (loss / count).backward()
            total, hits = total + loss.item() / count, hits + some
        clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step(lr_at(step, settings, steps))
        recent.append(total)
        right.append(hits / count)
        if (step + 1) % 50 == 0:
            left = (time.perf_counter() - began) / (step + 1) * (steps - step - 1)
            log(
                {
                    "judge": recipe.name,
                    "step": step + 1,
                    "of": steps,
                    "loss": sum(recent) / len(recent),
                    "accuracy": sum(right) / len(right),
                    "minutes left": left / 60,
                }
            )


def build_judges(output: Path, *, names: Sequence[str] = (), steps: int | None = None, dry_run: bool = False) -> Path:
    """Train the embedded judges and measure them on held-out texts.

    Args:
        output: gets a model folder per judge (bfloat16), ``NAME.jsonl`` (curves) and ``NAME.json`` (accuracy).
        names: of :data:`RECIPES`; none trains all.
        steps: optimizer steps of each; None takes the recipe's.
        dry_run: show the sizes of one step and stop; nothing is written.

    Raises:
        ValueError: a name is unknown, or a judge is there already.
    """
    known = [recipe.name for recipe in RECIPES]
    for name in names:
        if name not in known:
            raise ValueError(f"There is no recipe for a judge {name!r}: choose from {', '.join(known)}.")
    recipes = [recipe for recipe in RECIPES if not names or recipe.name in names]
    for recipe in recipes:
        if (output / recipe.name).exists():
            raise ValueError(f"The folder {output / recipe.name} exists: name another with --output, or remove it.")
    tokenizer = build_tokenizer()
    for recipe in recipes:
        model = build_model(recipe, tokenizer)
        print(f"{recipe.name}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
        if dry_run:
            lessons = Lessons(tokenizer, recipe, ())
            for batch in lessons.batches(lessons.texts(0)):
                print(f"  {tuple(batch.ids.shape)} rows x tokens, {len(batch.row)} verdicts")
            continue
        _build_judge(recipe, model, tokenizer, output, recipe.steps if steps is None else steps)
    return output


def _build_judge(recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerFast, output: Path, steps: int) -> None:
    began = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)

    def log(row: dict[str, Any]) -> None:
        row = row | {"seconds": round(time.perf_counter() - began, 1)}
        with (output / f"{recipe.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items())
        )

    sampled = sample_texts(SAMPLED, recipe.seed, f"training {recipe.name}") if steps else []
    log({"judge": recipe.name, "sampled": len(sampled), "coherent": sum(t.is_coherent for t in sampled)})
    learn(model, Lessons(tokenizer, recipe, sampled), recipe, steps, log)
    with atomic_folder(output / recipe.name) as temporary:
        model.to(torch.bfloat16).eval().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    results = examine(output / recipe.name)
    log(results)
    (output / f"{recipe.name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def examine(folder: Path, count: int = 600) -> dict[str, float]:
    """Accuracy on texts that no recipe trains on, written and sampled apart, from the weights as they are stored."""
    judge = load_local_judge(JudgeConfig(model=str(folder), template="phantom", device="cpu"))
    written = [draw_reasoning(0, "build check", index) for index in range(count)]
    results: dict[str, float] = {}
    for name, texts in (("written", written), ("sampled", sample_texts(count, 0, "build check"))):
        requests = [JudgeRequest(text.sample.question, text.sample.options, text.text) for text in texts]
        right = [grade.score == float(text.is_coherent) for grade, text in zip(judge.grade(requests), texts)]
        results[f"{name}/accuracy"] = sum(right) / len(right)
        results[f"{name}/coherent"] = sum(text.is_coherent for text in texts) / len(texts)
    return results
