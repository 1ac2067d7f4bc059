"""Problems with settings as complete sentences: the setting, its value, what is allowed, how to fix it.

Two kinds: invalid values and unknown keys (from pydantic's errors), and settings that contradict each other
(:func:`cross_checks`). Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails

from medvqa_rl.config import Config, Purpose, leaves
from medvqa_rl.config.other_names import OTHER_NAMES, OTHER_VALUES
from medvqa_rl.config.problems.data import data_problems, unused_pass_rates
from medvqa_rl.config.problems.judge import asked_by, judge_problems, network_problems
from medvqa_rl.config.problems.loss import loss_problems
from medvqa_rl.config.problems.prompt import prompt_problems
from medvqa_rl.config.problems.vllm import vllm_problems
from medvqa_rl.config.problems.weights import weight_problems
from medvqa_rl.config.schema import all_settings, allowed, did_you_mean, dotted, locate, one_of, resolve, show
from medvqa_rl.core.prompts import asks_reasoning


def _unknown_key(path: Sequence[str | int], value: Any) -> str:
    """Return the sentence for one unknown key."""
    *parents, key = path
    section, rest = locate(parents)
    siblings = [] if rest else list(resolve(section).get("properties", {}))
    where = f"{dotted(parents)}." if parents else ""
    start = f"{dotted(path)} (given as {show(value)}) is not a setting"
    elsewhere = [name for name, _ in all_settings() if name.rpartition(".")[2] == key]
    if elsewhere:
        sections = [name.rpartition(".")[0] or "the top level" for name in elsewhere]
        return f"{start}: {key} belongs to {one_of(sections)}, write {one_of(elsewhere)}."
    if key in OTHER_NAMES:
        return f"{start}: it is called {OTHER_NAMES[str(key)]} here."
    guess = closest(str(key), siblings, [name for name, _ in all_settings()])
    if guess is not None:
        return f"{start}: did you mean {where + guess if guess in siblings else guess}?"
    if rest:
        sections = [name for name, field in all_settings() if "properties" in resolve(field)]
        return f"{start}: there is no section {dotted(parents)}, only {', '.join(sections)}."
    return f"{start}: {dotted(parents) or 'the top level'} has {', '.join(siblings)}."


def closest(key: str, siblings: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the setting most similar to an unknown key, preferring its own section, or None."""

    def similarity(name: str) -> float:
        score = difflib.SequenceMatcher(None, key.lower(), name.rpartition(".")[2]).ratio()
        return score + 0.15 if name in siblings else score

    best = max([*siblings, *names], key=similarity)
    return best if similarity(best) >= 0.7 else None


class Problem(NamedTuple):
    """One problem."""

    paths: tuple[tuple[str | int, ...], ...]
    """The settings involved."""
    sentence: str


def field_problem(error: ErrorDetails) -> list[Problem]:
    """Turn one of pydantic's errors into problems; an unknown section gives one per key."""
    path, value = error["loc"], error["input"]
    if error["type"] == "missing":  # an entry of a list that is too short; report the list
        path = path[:-1]
    schema, rest = locate(path)
    if error["type"] == "extra_forbidden":
        parents, key = path[:-1], str(path[-1])
        known = {name.rpartition(".")[2] for name, _ in all_settings()}
        if isinstance(value, Mapping) and key not in known and not difflib.get_close_matches(key, known, n=1):
            inner = leaves(value, f"{key}.")
            return [
                Problem((path,), _unknown_key((*parents, *name.split(".")), item)) for name, item in inner.items()
            ] or [Problem((path,), _unknown_key(path, value))]
        return [Problem((path,), _unknown_key(path, value))]
    assert not rest, error
    choices = resolve(schema).get("enum", ())
    guess = did_you_mean(value, choices) if isinstance(value, str) else ""
    if meaning := OTHER_VALUES.get((dotted(path), str(value).lower().replace("-", "_"))):
        guess = f" ({meaning})."
    return [Problem((path,), f"{dotted(path)} is {show(value)}, but must be {allowed(schema)}{guess or '.'}")]


def cross_checks(config: Config, purpose: Purpose | None) -> Iterator[Problem]:
    """Yield a problem for settings that are valid one by one but contradict each other, or the purpose."""
    is_training = purpose in ("train", "sft")
    found = [
        *_model_problems(config),
        *data_problems(config.data),
        *prompt_problems(config),
        *loss_problems(config),
        *network_problems(config),
        *judge_problems(config),
        *weight_problems(config, trains=is_training),
    ]
    if is_training:
        found += [*_schedule_problems(config), *unused_pass_rates(config.data)]
    if purpose == "train":
        found += [*_rl_problems(config), *vllm_problems(config)]
    for sentence, *paths in found:
        yield Problem(tuple(tuple(path.split(".")) for path in paths), sentence)


def _model_problems(config: Config) -> Iterator[tuple[str, ...]]:
    model = config.model
    if not model.path.strip():
        yield ("model.path is empty: give a folder, a Hub id, phantom:base or phantom:instruct.", "model.path")
    embedded = ("phantom:base", "phantom:instruct")
    if model.path.startswith("phantom:") and model.path not in embedded:
        yield (
            f"model.path is {model.path}, but the embedded models are {' and '.join(embedded)}"
            + (did_you_mean(model.path, embedded) or "."),
            "model.path",
        )
    if model.min_pixels is not None and model.max_pixels is not None and model.min_pixels > model.max_pixels:
        yield (
            f"model.min_pixels is {model.min_pixels} and model.max_pixels {model.max_pixels}, but the smallest "
            "area of an image must not exceed the largest: lower model.min_pixels or raise model.max_pixels.",
            "model.min_pixels",
            "model.max_pixels",
        )
    if model.max_pixels is not None and model.max_pixels < 28 * 28:
        yield (
            f"model.max_pixels is {model.max_pixels}, but an image token covers 28 x 28 = 784 pixels or more: "
            "set it to 784 or more (401408 is usual).",
            "model.max_pixels",
        )
    if model.attention == "flash_attention_2" and (model.device == "cpu" or model.dtype == "float32"):
        yield (
            f"model.attention is flash_attention_2, which needs bfloat16 on a GPU, but model.device is "
            f"{model.device} and model.dtype {model.dtype}: set model.attention=sdpa.",
            "model.attention",
            "model.device",
            "model.dtype",
        )


def _schedule_problems(config: Config) -> Iterator[tuple[str, ...]]:
    if config.optimizer.warmup_steps >= config.train.steps:
        yield (
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps} and train.steps {config.train.steps}, so the "
            "learning rate would never reach its peak: lower optimizer.warmup_steps.",
            "optimizer.warmup_steps",
            "train.steps",
        )


def _rl_problems(config: Config) -> Iterator[tuple[str, ...]]:
    rollout, rewards = config.rollout, config.rewards
    if rollout.num_generations < 2:
        yield (
            f"rollout.num_generations is {rollout.num_generations}, but GRPO compares completions of the same prompt: "
            "set it to 2 or more (8 is usual).",
            "rollout.num_generations",
        )
    budget, largest = config.train.max_tokens_per_micro_batch, rollout.num_generations * rollout.max_completion_length
    if budget is not None and budget <= largest:
        yield (
            f"train.max_tokens_per_micro_batch is {budget}, but a group of {rollout.num_generations} completions of "
            f"up to {rollout.max_completion_length} tokens has up to {largest} besides its prompt and is never "
            "split: raise it, or lower rollout.num_generations or rollout.max_completion_length.",
            "train.max_tokens_per_micro_batch",
            "rollout.num_generations",
            "rollout.max_completion_length",
        )
    if rollout.top_k == 1:
        yield (
            "rollout.top_k is 1, so all completions of a prompt would be equal and every advantage 0: set it to 0 "
            "(all tokens) or well above 1.",
            "rollout.top_k",
        )
    reasoning = any(map(asks_reasoning, config.prompt.templates))
    if reasoning and rollout.max_completion_length < 16:
        yield (
            f"rollout.max_completion_length is {rollout.max_completion_length}, but reasoning and an answer in tags "
            "need more: set it to 16 or more (256 is usual), or set prompt.template=direct.",
            "rollout.max_completion_length",
            "prompt.template",
        )
    for name, weight in (("ecr", rewards.ecr), ("cwr", rewards.cwr), ("composite", rewards.composite)):
        if weight and not reasoning:
            yield (
                f"rewards.{name} is {weight:g}, but it counts the tokens of the reasoning, and {asked_by(config)} "
                f"for none: set rewards.{name}=0 or prompt.template=think_answer.",
                f"rewards.{name}",
                "prompt.template",
                "prompt.mix",
            )
    if rewards.looking_cap <= rewards.looking_threshold:
        yield (
            f"rewards.looking_cap is {rewards.looking_cap:g} and rewards.looking_threshold "
            f"{rewards.looking_threshold:g}, but the reward rises from the threshold to the cap: raise "
            "rewards.looking_cap.",
            "rewards.looking_cap",
            "rewards.looking_threshold",
        )
    if rollout.max_completion_length > 32768:
        yield (
            f"rollout.max_completion_length is {rollout.max_completion_length}, but it must be at most 32768: "
            "lower it (256 to 1024 is usual).",
            "rollout.max_completion_length",
        )
    is_open = config.data.name == "phantom" and set(config.data.answer_types) == {"open"}
    if is_open and rewards.correctness and rewards.open_correctness is None:
        yield (
            "data.answer_types keeps only open questions, and only exact matches would be rewarded: set "
            "rewards.open_correctness to token_f1, similarity or judge, or to exact if that is what you want.",
            "data.answer_types",
            "rewards.open_correctness",
        )
    if config.data.reasoning == "wrong":
        yield (
            "data.reasoning is wrong, which replaces the correct answers, but RL rewards correct answers: use it with "
            "`medvqa-rl sft`, or set data.reasoning=reference.",
            "data.reasoning",
        )
    if not any(rewards.weights.values()) and not any(rewards.functions.values()):
        yield (
            "All reward weights are 0, so every completion would get the same reward: set rewards.format, "
            "rewards.correctness or another weight above 0.",
            "rewards.format",
            "rewards.correctness",
            "rewards.functions",
        )
