"""The recipe of the embedded language model ``phantom:lm``, which says how fluent a text of the phantom world is.

    medvqa-rl phantom build-lm --output runs/lm

A small GPT-2 that reads what the reference completions say, without their tags. It neither rewards nor judges, so that
the perplexity it gives (``eval.perplexity_model: phantom:lm``) is no reward in disguise. A perplexity under it can be
held against another one under it and against those that the recipe reports for held-out, shuffled and cut texts; it
has nothing to do with the perplexity of medical English.

Data is addressed, so the same seed gives the same weights on the same machine and versions.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from medvqa_rl.config import OptimizerConfig
from medvqa_rl.core.answers import without_tags
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.randomness import Draws
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.evaluation.measures.fluency import LanguageModel, load_language_model
from medvqa_rl.evaluation.measures.measured import perplexity
from medvqa_rl.learning.objective.optimizer import Optimizer, lr_at
from medvqa_rl.models.checkpoints import atomic_folder
from medvqa_rl.phantom.judge import build_tokenizer

SEED = 0
STEPS = 700
BATCH = 32
LEARNING_RATE = 4e-3
POSITIONS = 384
"""Tokens read at once; longer texts are scored in windows."""


def reference_text(seed: int, split: str, index: int) -> str:
    """The index-th reference completion of a split, without its tags: reasoning and answer."""
    sample = draw_sample(seed=seed, split=f"lm {split}", index=index)
    return without_tags(render_answer(sample.reasoning, sample.answer))


def shuffled_words(text: str, draws: Draws) -> str:
    """The same words in another order."""
    return " ".join(draws.shuffled(text.split()))


def cut_short(text: str, draws: Draws) -> str:
    """The text up to a character before its end, at least one."""
    return text[: 1 + draws.below(len(text))]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    """The model with random weights, float32."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=-(-len(tokenizer) // 16) * 16,
            n_positions=POSITIONS,
            n_embd=96,
            n_layer=3,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )


def _collate(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """(texts, T) ids between two end tokens, and (texts, T - 1) what is to be predicted; -100 is not."""
    end = tokenizer.eos_token_id
    rows = [[end, *tokenizer(text)["input_ids"], end][:POSITIONS] for text in texts]
    ids = torch.full((len(rows), max(map(len, rows))), end)
    targets = torch.full((len(rows), ids.shape[1] - 1), -100)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
    return ids, targets


def build_lm(output: Path, *, seed: int = SEED, steps: int = STEPS, dry_run: bool = False) -> Path:
    """Train the embedded language model and measure it on held-out texts.

    Args:
        output: gets the model's folder ``lm`` (bfloat16), ``lm.jsonl`` (curve) and ``lm.json`` (perplexities).
        seed: of weights and data.
        steps: optimizer steps.
        dry_run: show the sizes of one step and stop; nothing is written.

    Raises:
        ValueError: a model is there already.
    """
    if (output / "lm").exists():
        raise ValueError(f"The folder {output / 'lm'} exists: name another with --output, or remove it.")
    tokenizer = build_tokenizer()
    model: Any = build_model(tokenizer, seed)
    print(f"lm: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    if dry_run:
        ids, _ = _collate([reference_text(seed, "train", index) for index in range(BATCH)], tokenizer)
        print(f"  {tuple(ids.shape)} rows x tokens")
        return output
    output.mkdir(parents=True, exist_ok=True)
    _learn(model, tokenizer, seed, steps, output / "lm.jsonl")
    with atomic_folder(output / "lm") as temporary:
        model.to(torch.bfloat16).eval().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    results = examine(load_language_model(str(output / "lm"), "cpu"))
    (output / "lm.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("  ".join(f"{name} {value:.2f}" for name, value in results.items()))
    return output


def _learn(model: Any, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, curve: Path) -> None:
    settings = OptimizerConfig(
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        min_lr_ratio=0.02,
        warmup_steps=min(50, steps // 4),
        weight_decay=0.05,
        betas=(0.9, 0.98),
    )
    optimizer, recent, began = Optimizer(model, settings), deque[float](maxlen=50), time.perf_counter()
    model.train()
    for step in range(steps):
        texts = [reference_text(seed, "train", step * BATCH + row) for row in range(BATCH)]
        ids, targets = _collate(texts, tokenizer)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(lr_at(step, settings, steps))
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - began
            row = {"step": step + 1, "of": steps, "loss": sum(recent) / len(recent), "seconds": round(seconds, 1)}
            with curve.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"step {step + 1} of {steps}  loss {row['loss']:.3f}  {seconds:.0f} s")


def examine(model: LanguageModel, count: int = 400) -> dict[str, float]:
    """Perplexities of held-out reference texts, of the same with their words shuffled, and of the same cut short."""
    texts = [reference_text(SEED, "held out", index) for index in range(count)]
    draws = [Draws("phantom lm", index) for index in range(count)]
    kinds = {
        "held out": texts,
        "shuffled": [shuffled_words(text, draw) for text, draw in zip(texts, draws)],
        "cut short": [cut_short(text, draw) for text, draw in zip(texts, draws)],
    }
    found = {}
    for name, some in kinds.items():
        likelihoods = model.score(some)
        found[name] = perplexity((each.nll for each in likelihoods), (each.num_tokens for each in likelihoods))
    return found
