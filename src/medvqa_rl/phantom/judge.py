"""The recipe of the embedded judges: small BioGPT models that classify phantom reasoning as coherent or not.

    medvqa-rl phantom build-judges --output runs/judges

A judge reads only the reasoning and predicts " Yes" or " No" as the next token. It is trained on a verdict at the end
of every sentence, whose label is that of the text up to there. This shows it where the reasoning goes wrong and gives
many labels for one forward pass. Labels come from :func:`medvqa_rl.data.phantom.claims.is_coherent`, which knows the
world's rules but not the image.

The texts are reference, edited and damaged reasonings (:mod:`medvqa_rl.data.phantom.reasonings`) and reasonings
sampled from the embedded policies. The same seed gives the same weights on the same machine and package versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BioGptConfig, BioGptForCausalLM, PreTrainedTokenizerFast

from medvqa_rl.config import JudgeConfig, ModelConfig, RolloutConfig
from medvqa_rl.core.answers import parse_completion
from medvqa_rl.core.files import write_json
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.data.phantom.reasonings import Reasoning, draw_reasoning
from medvqa_rl.models.loading import load_policy
from medvqa_rl.phantom.judge_lessons import POSITIONS, Lessons, Probes, Recipe, lesson_loss
from medvqa_rl.phantom.training import (
    Log,
    byte_level_bpe,
    cosine_schedule,
    count_parameters,
    curve_log,
    refuse_existing,
    save_model,
    train,
)
from medvqa_rl.rewards.judges import JudgeRequest
from medvqa_rl.rewards.judges.local import load_local_judge
from medvqa_rl.rollout.decode import RolloutEngine

SEEING = "judge_sees"
"""The judge of :mod:`medvqa_rl.phantom.seeing_judge`, which has a recipe of its own."""
PAD, END = "<pad>", "</s>"
TEMPERATURES = (1.0, 1.15, 1.3)
"""Sampling temperatures of the policies, used equally often."""
SAMPLED = 3000
"""Number of sampled texts that each judge is trained on."""

_STRENGTH = 2.0
"""Scale of the queries and keys that initially attend to earlier positions."""

RECIPES = (
    Recipe("judge", 0, 96, 4, 6, 288, "broad", 0.35, 2600, 3e-3),
    Recipe("judge_eval", 1, 80, 5, 5, 240, "damaged", 0.5, 2600, 3e-3),
)
"""The judge used as a reward and the one used for evaluation; seed, size, data and share of sampled texts differ."""


def build_tokenizer(vocab_size: int = 560) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on phantom reasonings; " Yes" and " No" are single tokens."""
    texts = [draw_reasoning(0, "tokenizer", index).text for index in range(4000)]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=byte_level_bpe([*texts, *["? Yes", "? No"] * 500], vocab_size, (PAD, END)),
        eos_token=END,
        pad_token=PAD,
        model_max_length=POSITIONS,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> BioGptForCausalLM:
    """Build a judge with random float32 weights, initialised to compare words (:func:`_initialise_for_comparing`)."""
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
    _initialise_for_comparing(model, recipe)
    return model


@torch.no_grad()
def _initialise_for_comparing(model: Any, recipe: Recipe) -> None:
    """Initialise attention to find the tokens before a word and the earlier occurrences of the word.

    Contradictions and repetitions involve a word that occurs twice in different contexts. With the usual
    initialisation, the heads that find the context and the heads that find the earlier occurrence must both be learned
    before either helps. Therefore:

    - The first hidden dimensions, as many as a head is wide, start as sines and cosines of the position only.
    - Half the heads of layer 0 read them, rotated by an angle per step back, and so attend 1, 2, ... tokens back.
    - Half the heads of each later layer start with equal query and key projections, so that a token attends to equal
      tokens, and with a penalty on its own position.

    All weights are trained from there.
    """
    width = recipe.hidden // recipe.heads
    half = width // 2
    frequency = 100.0 ** (-torch.arange(half) / half)  # from 1 radian per token to a full turn in about 600 tokens
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
                # Two fast frequencies with opposite signs: the lowest score is at distance 0, the word itself.
                query[-4:], key[-4:] = 0.0, 0.0
                for row, column in zip(range(-4, 0), (0, half, 1, half + 1)):
                    query[row, column], key[row, column] = 1.0, -1.0
                continue
            # q . k is proportional to the sum over f of cos(f * (distance - steps)), which peaks at distance = steps
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
    """Sample reasonings from the embedded policies, half from each, on both scanners, at :data:`TEMPERATURES`.

    Four completions are sampled per question. If a completion has no think section and no tags, its whole text is
    used: the base model reasons in plain text.
    """
    texts: list[Reasoning] = []
    for number, name in enumerate(("instruct", "base")):
        engine = RolloutEngine(load_policy(ModelConfig(path=f"phantom:{name}", device="cpu")))
        for turn, temperature in enumerate(TEMPERATURES):
            num_questions = -(-count // (4 * 2 * len(TEMPERATURES)))
            samples = [
                draw_sample(
                    seed=seed,
                    split=f"judged {split} {name} {turn}",
                    index=index,
                    scanner=("home", "unseen")[index % 2],
                )
                for index in range(num_questions)
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
    """Train the model together with its probes."""
    probes = Probes(recipe.hidden, recipe.seed)

    def backward(step: int) -> dict[str, float]:
        batches = lessons.batches(lessons.texts(step))
        count = sum(len(batch.label) for batch in batches)
        total, num_right = 0.0, 0
        for batch in batches:
            loss, right = lesson_loss(model, probes, batch, lessons.answers)
            (loss / count).backward()
            total, num_right = total + loss.item() / count, num_right + right
        return {"loss": total, "accuracy": num_right / count}

    both = nn.ModuleDict({"model": model, "probes": probes}).train()
    settings = cosine_schedule(recipe.learning_rate, warmup_steps=min(50, steps // 4))
    train(both, settings, steps, backward, log, judge=recipe.name)


def build_judges(output: Path, *, names: Sequence[str] = (), steps: int | None = None, dry_run: bool = False) -> Path:
    """Train the embedded judges and evaluate them on held-out texts.

    Args:
        output: folder for a model folder per judge (bfloat16), ``NAME.jsonl`` (learning curve) and ``NAME.json``
            (accuracy).
        names: names of :data:`RECIPES`; defaults to all of them.
        steps: number of optimizer steps per judge; defaults to the recipe's.
        dry_run: print the shapes of one step and stop; nothing is written.

    Raises:
        ValueError: a name is unknown, or the folder of a judge exists.
    """
    known = [recipe.name for recipe in RECIPES]
    for name in names:
        if name not in known:
            raise ValueError(f"There is no recipe for a judge {name!r}: choose from {', '.join([*known, SEEING])}.")
    recipes = [recipe for recipe in RECIPES if not names or recipe.name in names]
    for recipe in recipes:
        refuse_existing(output / recipe.name)
    tokenizer = build_tokenizer()
    for recipe in recipes:
        model = build_model(recipe, tokenizer)
        print(f"{recipe.name}: {count_parameters(model):,} parameters")
        if dry_run:
            lessons = Lessons(tokenizer, recipe, ())
            for batch in lessons.batches(lessons.texts(0)):
                print(f"  {tuple(batch.ids.shape)} rows x tokens, {len(batch.row)} verdicts")
            continue
        _build_judge(recipe, model, tokenizer, output, recipe.steps if steps is None else steps)
    return output


def _build_judge(recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerFast, output: Path, steps: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    log = curve_log(output / f"{recipe.name}.jsonl")
    sampled = sample_texts(SAMPLED, recipe.seed, f"training {recipe.name}") if steps else []
    log({"judge": recipe.name, "sampled": len(sampled), "coherent": sum(text.is_coherent for text in sampled)})
    learn(model, Lessons(tokenizer, recipe, sampled), recipe, steps, log)
    save_model(model, tokenizer, output / recipe.name)
    results = examine(output / recipe.name)
    log(results)
    write_json(output / f"{recipe.name}.json", results)


def examine(folder: Path, count: int = 600) -> dict[str, float]:
    """Accuracy of the saved weights on held-out texts: written and sampled ones separately."""
    judge = load_local_judge(JudgeConfig(model=str(folder), template="phantom", device="cpu"))
    written = [draw_reasoning(0, "build check", index) for index in range(count)]
    results: dict[str, float] = {}
    for name, texts in (("written", written), ("sampled", sample_texts(count, 0, "build check"))):
        requests = [JudgeRequest(text.sample.question, text.sample.options, text.text) for text in texts]
        right = [grade.score == float(text.is_coherent) for grade, text in zip(judge.grade(requests), texts)]
        results[f"{name}/accuracy"] = sum(right) / len(right)
        results[f"{name}/coherent"] = sum(text.is_coherent for text in texts) / len(texts)
    return results
