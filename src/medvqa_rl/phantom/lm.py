"""The recipe of the embedded language model ``phantom:lm``, which measures the fluency of phantom texts.

    medvqa-rl phantom build-lm --output runs/lm

A small GPT-2 trained on the reference completions without their tags. It is used neither as a reward nor as a judge,
so its perplexity (``eval.perplexity_model: phantom:lm``) is independent of what is optimised. Its perplexities can be
compared with each other and with those of the held-out, shuffled and truncated texts that the recipe reports, but not
with the perplexity of medical English.

The same seed gives the same weights on the same machine and package versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from medvqa_rl.core.answers import without_tags
from medvqa_rl.core.files import write_json
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.randomness import Draws
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.evaluation.measures.fluency import LanguageModel, load_language_model
from medvqa_rl.evaluation.measures.measured import perplexity
from medvqa_rl.phantom.judge import build_tokenizer
from medvqa_rl.phantom.training import (
    cosine_schedule,
    count_parameters,
    curve_log,
    refuse_existing,
    save_model,
    train,
)

SEED = 0
STEPS = 700
BATCH = 32
LEARNING_RATE = 4e-3
POSITIONS = 384
"""Context length in tokens; longer texts are scored in windows."""


def reference_text(seed: int, split: str, index: int) -> str:
    """Reasoning and answer of the index-th reference completion of a split, without tags."""
    sample = draw_sample(seed=seed, split=f"lm {split}", index=index)
    return without_tags(render_answer(sample.reasoning, sample.answer))


def shuffled_words(text: str, draws: Draws) -> str:
    """The same words in random order."""
    return " ".join(draws.shuffled(text.split()))


def cut_short(text: str, draws: Draws) -> str:
    """A random prefix of the text, at least one character long."""
    return text[: 1 + draws.below(len(text))]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    """Build the model with random float32 weights."""
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
    """(texts, T) padded ids between two end tokens, and (texts, T - 1) next-token targets, -100 for padding."""
    end = tokenizer.eos_token_id
    rows = [[end, *tokenizer(text)["input_ids"], end][:POSITIONS] for text in texts]
    ids = torch.full((len(rows), max(map(len, rows))), end)
    targets = torch.full((len(rows), ids.shape[1] - 1), -100)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
    return ids, targets


def build_lm(output: Path, *, seed: int = SEED, steps: int = STEPS, dry_run: bool = False) -> Path:
    """Train the embedded language model and evaluate it on held-out texts.

    Args:
        output: folder for the model ``lm`` (bfloat16), ``lm.jsonl`` (learning curve) and ``lm.json`` (perplexities).
        seed: seed of weights and data.
        steps: number of optimizer steps.
        dry_run: print the shapes of one step and stop; nothing is written.

    Raises:
        ValueError: the model folder exists.
    """
    refuse_existing(output / "lm")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    print(f"lm: {count_parameters(model):,} parameters")
    if dry_run:
        ids, _ = _collate([reference_text(seed, "train", index) for index in range(BATCH)], tokenizer)
        print(f"  {tuple(ids.shape)} rows x tokens")
        return output
    output.mkdir(parents=True, exist_ok=True)
    model.train()

    def backward(step: int) -> dict[str, float]:
        ids, targets = _collate([reference_text(seed, "train", step * BATCH + row) for row in range(BATCH)], tokenizer)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        return {"loss": loss.item()}

    settings = cosine_schedule(LEARNING_RATE, warmup_steps=min(50, steps // 4))
    train(model, settings, steps, backward, curve_log(output / "lm.jsonl"))
    save_model(model, tokenizer, output / "lm")
    results = examine(load_language_model(str(output / "lm"), "cpu"))
    write_json(output / "lm.json", results)
    print("  ".join(f"{name} {value:.2f}" for name, value in results.items()))
    return output


def examine(model: LanguageModel, count: int = 400) -> dict[str, float]:
    """Perplexities of held-out reference texts, and of the same texts with shuffled words and truncated."""
    texts = [reference_text(SEED, "held out", index) for index in range(count)]
    draws = [Draws("phantom lm", index) for index in range(count)]
    kinds = {
        "held out": texts,
        "shuffled": [shuffled_words(text, draw) for text, draw in zip(texts, draws)],
        "cut short": [cut_short(text, draw) for text, draw in zip(texts, draws)],
    }
    perplexities = {}
    for name, variants in kinds.items():
        scores = model.score(variants)
        perplexities[name] = perplexity((each.nll for each in scores), (each.num_tokens for each in scores))
    return perplexities
