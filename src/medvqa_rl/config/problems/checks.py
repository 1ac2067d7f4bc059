"""What can be wrong with settings, said in complete sentences: the setting, the value, what is allowed, the remedy.

Two kinds: a value that its field does not allow or a key that is no setting (from pydantic's errors), and settings
that do not fit together (:func:`cross_checks`). Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails

from medvqa_rl.config import Config, Purpose, leaves
from medvqa_rl.config.other_names import OTHER_NAMES
from medvqa_rl.config.problems.data import data_problems
from medvqa_rl.config.problems.judge import asked_by, judge_problems, network_problems
from medvqa_rl.config.problems.quantized import quantized_problems
from medvqa_rl.config.problems.vllm import vllm_problems
from medvqa_rl.config.schema import all_settings, allowed, did_you_mean, dotted, locate, one_of, resolve, show
from medvqa_rl.core.prompts import asks_reasoning


def _unknown_key(path: Sequence[str | int], value: Any) -> str:
    """The sentence for one key that is no setting."""
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
    """The name most like an unknown key: one of its own section's, unless another section has a much better one."""

    def likeness(name: str) -> float:
        score = difflib.SequenceMatcher(None, key.lower(), name.rpartition(".")[2]).ratio()
        return score + 0.15 if name in siblings else score

    best = max([*siblings, *names], key=likeness)
    return best if likeness(best) >= 0.7 else None


class Problem(NamedTuple):
    """One thing that is wrong."""

    paths: tuple[tuple[str | int, ...], ...]
    """The settings that it is about."""
    sentence: str


def field_problem(error: ErrorDetails) -> list[Problem]:
    """Sentences for one of pydantic's errors; a section that does not exist gives one for each of its keys."""
    path, value = error["loc"], error["input"]
    if error["type"] == "missing":  # an entry of a list that is too short: the value is the list
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
    return [Problem((path,), f"{dotted(path)} is {show(value)}, but must be {allowed(schema)}{guess or '.'}")]


def cross_checks(config: Config, purpose: Purpose | None) -> Iterator[Problem]:
    """Settings that are allowed one by one but do not fit together, or not for the purpose."""
    yield from _check_model(config)
    yield from _check_data(config)
    yield from _check_loss(config)
    for sentence, *paths in network_problems(config):
        yield _problem(sentence, *paths)
    for sentence, *paths in judge_problems(config):
        yield _problem(sentence, *paths)
    for sentence, *paths in quantized_problems(config, trains=purpose in ("train", "sft")):
        yield _problem(sentence, *paths)
    if purpose in ("train", "sft"):
        yield from _check_training(config)
    if purpose == "train":
        yield from _check_grpo(config)
        for sentence, *paths in vllm_problems(config):
            yield _problem(sentence, *paths)


def _problem(sentence: str, *paths: str) -> Problem:
    return Problem(tuple(tuple(path.split(".")) for path in paths), sentence)


def _check_model(config: Config) -> Iterator[Problem]:
    model = config.model
    if not model.path.strip():
        yield _problem("model.path is empty: give a folder, a Hub id, phantom:base or phantom:instruct.", "model.path")
    embedded = ("phantom:base", "phantom:instruct")
    if model.path.startswith("phantom:") and model.path not in embedded:
        yield _problem(
            f"model.path is {model.path}, but the embedded models are {' and '.join(embedded)}"
            + (did_you_mean(model.path, embedded) or "."),
            "model.path",
        )
    if model.min_pixels is not None and model.max_pixels is not None and model.min_pixels > model.max_pixels:
        yield _problem(
            f"model.min_pixels is {model.min_pixels} and model.max_pixels {model.max_pixels}, but the smallest "
            "area of an image must not exceed the largest: lower model.min_pixels or raise model.max_pixels.",
            "model.min_pixels",
            "model.max_pixels",
        )
    if model.max_pixels is not None and model.max_pixels < 28 * 28:
        yield _problem(
            f"model.max_pixels is {model.max_pixels}, but one image token covers 28 x 28 = 784 pixels: set it to "
            "784 or more (401408 is usual for Qwen2-VL).",
            "model.max_pixels",
        )
    if model.attention == "flash_attention_2" and (model.device == "cpu" or model.dtype == "float32"):
        yield _problem(
            f"model.attention is flash_attention_2, which runs in bfloat16 on a GPU only, but model.device is "
            f"{model.device} and model.dtype {model.dtype}: set model.attention=sdpa.",
            "model.attention",
            "model.device",
            "model.dtype",
        )


def _check_data(config: Config) -> Iterator[Problem]:
    for sentence, *paths in data_problems(config.data):
        yield _problem(sentence, *paths)


def _check_loss(config: Config) -> Iterator[Problem]:
    loss = config.loss
    if loss.epsilon_high is not None and loss.epsilon_high < loss.epsilon:
        yield _problem(
            f"loss.epsilon_high is {loss.epsilon_high} and loss.epsilon {loss.epsilon}, but the upper clip range "
            "must be at least the lower one: raise loss.epsilon_high (0.28 is usual) or set it to null.",
            "loss.epsilon_high",
            "loss.epsilon",
        )

    if loss.type == "dpo" and loss.beta == 0:
        yield _problem(
            "loss.beta is 0, but with loss.type=dpo it scales the preference itself: set it above 0 (0.1 is usual).",
            "loss.beta",
            "loss.type",
        )
    if loss.type == "dpo" and loss.num_iterations > 1:
        yield _problem(
            f"loss.num_iterations is {loss.num_iterations}, but loss.type=dpo learns once from what was sampled: set "
            "it to 1, or choose grpo.",
            "loss.num_iterations",
            "loss.type",
        )


def _check_training(config: Config) -> Iterator[Problem]:
    if config.optimizer.warmup_steps >= config.train.steps:
        yield _problem(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps} and train.steps {config.train.steps}, so the "
            "learning rate would never reach its height: warm up for fewer steps.",
            "optimizer.warmup_steps",
            "train.steps",
        )


def _check_grpo(config: Config) -> Iterator[Problem]:
    rollout, rewards = config.rollout, config.rewards
    if rollout.num_generations < 2:
        yield _problem(
            f"rollout.num_generations is {rollout.num_generations}, but GRPO compares completions of the same prompt: "
            "set it to 2 or more (8 is usual).",
            "rollout.num_generations",
        )
    budget, largest = config.train.max_tokens_per_micro_batch, rollout.num_generations * rollout.max_completion_length
    if budget is not None and budget <= largest:
        yield _problem(
            f"train.max_tokens_per_micro_batch is {budget}, but a group of {rollout.num_generations} completions of "
            f"up to {rollout.max_completion_length} tokens has up to {largest} besides its prompt and is never "
            "divided: raise it, or lower rollout.num_generations or rollout.max_completion_length.",
            "train.max_tokens_per_micro_batch",
            "rollout.num_generations",
            "rollout.max_completion_length",
        )
    if rollout.top_k == 1:
        yield _problem(
            "rollout.top_k is 1, so all completions of a prompt would be equal and there would be nothing to learn "
            "from: set it to 0 (all tokens) or well above 1.",
            "rollout.top_k",
        )
    reasoning = any(map(asks_reasoning, config.prompt.templates))
    if reasoning and rollout.max_completion_length < 16:
        yield _problem(
            f"rollout.max_completion_length is {rollout.max_completion_length}, but reasoning and answer with their "
            "tags need more: set it to 16 or more (256 is usual), or set prompt.template=direct.",
            "rollout.max_completion_length",
            "prompt.template",
        )
    for name, weight in (("ecr", rewards.ecr), ("cwr", rewards.cwr)):
        if weight and not reasoning:
            yield _problem(
                f"rewards.{name} is {weight:g}, but it counts the tokens of the reasoning, and {asked_by(config)} "
                f"for none: set rewards.{name}=0 or prompt.template=think_answer.",
                f"rewards.{name}",
                "prompt.template",
                "prompt.mix",
            )
    if rollout.max_completion_length > 32768:
        yield _problem(
            f"rollout.max_completion_length is {rollout.max_completion_length}, but Qwen2-VL reads at most 32768 "
            "tokens, the prompt included: lower it (256 to 1024 is usual).",
            "rollout.max_completion_length",
        )
    is_open = config.data.name == "phantom" and set(config.data.answer_types) == {"open"}
    if is_open and rewards.correctness and rewards.open_correctness is None:  # stored questions are looked at later
        yield _problem(
            "data.answer_types keeps open questions alone, and only exact words would be rewarded: set "
            "rewards.open_correctness to token_f1, similarity or judge, or to exact if that is what you want.",
            "data.answer_types",
            "rewards.open_correctness",
        )
    judged, lengths = (rewards.semantic, rewards.reasoning), (rewards.ecr, rewards.cwr, rewards.cosine)
    others = (*judged, *lengths, rewards.overlong, rewards.repetition)
    if not (rewards.format or rewards.correctness or any(others) or any(rewards.functions.values())):
        yield _problem(
            "rewards.format, rewards.correctness and rewards.functions all have weight 0, and so has every other "
            "part, so every completion would get the same reward: set one of them above 0.",
            "rewards.format",
            "rewards.correctness",
            "rewards.functions",
        )
