"""Checks of the judge settings. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from medvqa_rl.config import Config, JudgeConfig
from medvqa_rl.core.network import is_loopback
from medvqa_rl.core.prompts import asks_reasoning

EMBEDDED_SEEING = "phantom:judge_sees"
EMBEDDED_JUDGES = ("phantom:judge", "phantom:judge_eval", EMBEDDED_SEEING)
EMBEDDED_LM = "phantom:lm"
"""The phantom world's language model: it measures perplexity and does not judge."""
_DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")


def judge_problems(config: Config) -> Iterator[tuple[str, ...]]:
    """Yield each problem as a sentence, followed by the dotted paths of the settings involved."""
    yield from _problems("judge", config.judge)
    if config.eval_judge is not None:
        yield from _problems("eval_judge", config.eval_judge)
    yield from _perplexity_problems(config)
    rewards = config.rewards
    if rewards.open_correctness == "judge" and config.judge.endpoint is None and config.judge.model in EMBEDDED_JUDGES:
        yield (
            f"rewards.open_correctness is judge, but judge.model is {config.judge.model}, which only reads reasoning "
            "and cannot compare answers: set judge.model to a chat or instruct model, or to an endpoint's, or "
            "rewards.open_correctness to token_f1 or similarity.",
            "rewards.open_correctness",
            "judge.model",
        )
    if rewards.process and config.loss.type == "dpo":
        yield (
            f"rewards.process is {rewards.process:g}, but loss.type is dpo, which prefers whole completions and gives "
            "tokens no advantages: set rewards.process=0 or another loss.type.",
            "rewards.process",
            "loss.type",
        )
    for name in ("semantic", "reasoning", "process"):
        weight, what = rewards.weights[name], "steps" if name == "process" else "reasoning"
        if weight and not any(map(asks_reasoning, config.prompt.templates)):
            yield (
                f"rewards.{name} is {weight:g}, but {asked_by(config)} for no {what} to judge: set "
                f"rewards.{name}=0 or prompt.template=think_answer.",
                f"rewards.{name}",
                "prompt.template",
                "prompt.mix",
            )


def network_problems(config: Config) -> Iterator[tuple[str, ...]]:
    """Yield settings that would send data off this machine although ``network`` is off."""
    if config.network == "on":
        return
    judges = {"judge": config.judge} | ({} if config.eval_judge is None else {"eval_judge": config.eval_judge})
    for name, judge in judges.items():
        host = urlsplit(judge.endpoint or "").hostname
        if host and not is_loopback(host):
            yield (
                f"{name}.endpoint is on {host}, but network is off, so nothing may leave this machine: serve the "
                "judge here (http://localhost:8000/v1), or set network=on.",
                f"{name}.endpoint",
                "network",
            )
    if config.train.tracker_online:
        yield (
            "train.tracker_online is true, but network is off, so nothing may leave this machine: set "
            "train.tracker_online=false, or network=on.",
            "train.tracker_online",
            "network",
        )


def asked_by(config: Config) -> str:
    """How training asks, as the beginning of a sentence: "prompt.template=direct asks"."""
    if not config.prompt.mix.is_on:
        return f"prompt.template={config.prompt.template} asks"
    return f"prompt.mix ({', '.join(config.prompt.templates)}) asks"


def _perplexity_problems(config: Config) -> Iterator[tuple[str, ...]]:
    name, judge = config.eval.perplexity_model, config.judge
    if name is None:
        return
    is_folder = Path(name).is_dir() and Path(judge.model).is_dir()
    is_judge = name == judge.model or (is_folder and Path(name).samefile(judge.model))
    part, weight = next(iter(config.rewards.judged.items()), ("", 0.0))
    if part and judge.endpoint is None and is_judge:
        yield (
            f"eval.perplexity_model is {name}, but that is the judge that rewards (rewards.{part} is "
            f"{weight:g}), so its perplexity would measure how well it was pleased: name a fixed language "
            "model that does not reward.",
            "eval.perplexity_model",
            "judge.model",
            f"rewards.{part}",
        )
    elif name.startswith("phantom:") and name != EMBEDDED_LM:
        yield (
            f"eval.perplexity_model is {name}, but the embedded language model is {EMBEDDED_LM}: name that, a folder "
            "or a Hub id.",
            "eval.perplexity_model",
        )


def _problems(name: str, judge: JudgeConfig) -> Iterator[tuple[str, ...]]:
    embedded = f"{', '.join(EMBEDDED_JUDGES[:-1])} and {EMBEDDED_JUDGES[-1]}"
    if not judge.model.strip():
        yield f"{name}.model is empty: give a folder, a Hub id, or one of {embedded}.", f"{name}.model"
    if not _DEVICES.fullmatch(judge.device):
        yield f"{name}.device is '{judge.device}', but must be auto, cpu, cuda or such as cuda:1.", f"{name}.device"
    is_embedded = judge.model.startswith("phantom:")
    if is_embedded and judge.model not in EMBEDDED_JUDGES:
        yield f"{name}.model is {judge.model}, but the embedded judges are {embedded}.", f"{name}.model"
    elif is_embedded and judge.template not in ("auto", "phantom"):
        yield (
            f"{name}.template is {judge.template}, but the embedded judges only read the reasoning: remove it.",
            f"{name}.template",
        )
    yield from _sight_problems(name, judge, is_embedded=is_embedded)
    if judge.endpoint is None:
        if judge.api_key_env is not None:
            yield (
                f"{name}.api_key_env is set, but {name}.endpoint is not, and a judge on this machine needs no key: "
                f"set {name}.endpoint to the server's address, or remove {name}.api_key_env.",
                f"{name}.api_key_env",
            )
        return
    url = urlsplit(judge.endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        yield (
            f"{name}.endpoint is '{judge.endpoint}', but must be the address of a server, such as "
            "http://localhost:8000/v1.",
            f"{name}.endpoint",
        )
    if url.username or url.password or url.query:
        yield (
            f"{name}.endpoint holds a user, a password or a query, which would be written into the run's folder: give "
            f"the bare address, and the key by an environment variable that {name}.api_key_env names.",
            f"{name}.endpoint",
        )
    if is_embedded:
        yield (
            f"{name}.model is {judge.model}, but {name}.endpoint is set: give the name of the server's model.",
            f"{name}.model",
        )
    if judge.strictness != 0:
        yield (
            f"{name}.strictness is {judge.strictness:g}, but an endpoint answers in words, without probabilities: set "
            "it to 0.",
            f"{name}.strictness",
        )
    if judge.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", judge.api_key_env):
        # A key pasted here would be written into the run's folder, so it is not repeated in the message either.
        yield (
            f"{name}.api_key_env is not the name of an environment variable: name the variable that holds the key, "
            "such as OPENAI_API_KEY, never the key itself.",
            f"{name}.api_key_env",
        )


def _sight_problems(name: str, judge: JudgeConfig, *, is_embedded: bool) -> Iterator[tuple[str, ...]]:
    """Judges that are shown what they cannot see, or that are not shown what they need."""
    settings = (f"{name}.sees", f"{name}.model")
    if judge.model == EMBEDDED_SEEING and judge.sees == "text":
        yield (
            f"{name}.model is {judge.model}, which compares the reasoning with the image or its description, but "
            f"{name}.sees is text: set {name}.sees to image or description, or {name}.model=phantom:judge.",
            *settings,
        )
    elif is_embedded and judge.model != EMBEDDED_SEEING and judge.sees != "text":
        yield (
            f"{name}.sees is {judge.sees}, but {judge.model} only reads the reasoning: set {name}.sees=text, or "
            f"{name}.model={EMBEDDED_SEEING}.",
            *settings,
        )
    if judge.sees == "image" and judge.template in ("biogpt", "biomistral"):
        yield (
            f"{name}.sees is image, but {name}.template is {judge.template}, which has no place for an image: set "
            f"{name}.template=auto.",
            f"{name}.sees",
            f"{name}.template",
        )
    if judge.sees == "image" and name == "eval_judge":
        yield (
            "eval_judge.sees is image, but evaluations have the stored answers judged, without images: set "
            "eval_judge.sees=text or description.",
            "eval_judge.sees",
        )
