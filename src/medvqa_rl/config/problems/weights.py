"""Problems with settings of how weights are loaded, as complete sentences. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from medvqa_rl.config import Config, ModelConfig


def weight_problems(config: Config, *, trains: bool) -> Iterator[tuple[str, ...]]:
    """Yield each problem: a sentence, then the dotted paths of the settings involved.

    Args:
        trains: the settings are for training; evaluation of a 4-bit model needs no adapter.
    """
    yield from _average_problems(config, trains=trains)
    yield from _quantized_problems(config, trains=trains)


def _average_problems(config: Config, *, trains: bool) -> Iterator[tuple[str, ...]]:
    model = config.model
    if model.average_with is None:
        if model.average_weight != ModelConfig().average_weight:
            yield (
                f"model.average_weight is {model.average_weight:g}, but model.average_with is not set: set it to the "
                "model to average with, such as the one that training started from, or leave out "
                "model.average_weight.",
                "model.average_weight",
                "model.average_with",
            )
    elif trains:
        yield (
            f"model.average_with is {model.average_with}, but weights are averaged after training: leave it out here. "
            "To train from an average, write it with medvqa-rl export --average and set model.path to that folder.",
            "model.average_with",
        )
    elif model.load_in_4bit:
        yield (
            "model.load_in_4bit is true, but 4-bit weights cannot be averaged: set it to false, or leave out "
            "model.average_with.",
            "model.load_in_4bit",
            "model.average_with",
        )


def _quantized_problems(config: Config, *, trains: bool) -> Iterator[tuple[str, ...]]:
    model, engine = config.model, config.train.engine
    if not model.load_in_4bit:
        return
    if trains and model.lora is None and model.adapter is None:
        yield (
            "model.load_in_4bit is true, but 4-bit weights cannot be trained: set model.lora to train an adapter "
            "above them, or set model.load_in_4bit to false.",
            "model.load_in_4bit",
            "model.lora",
        )
    if trains and engine not in ("auto", "ddp"):
        yield (refuse_sharded(engine), "model.load_in_4bit", "train.engine")
    if config.rollout.engine == "graph":
        yield (
            "rollout.engine is graph, but CUDA graphs are not tested with 4-bit weights (model.load_in_4bit is true): "
            "set rollout.engine to eager.",
            "model.load_in_4bit",
            "rollout.engine",
        )


def refuse_sharded(engine: str) -> str:
    """Return the sentence that refuses 4-bit weights under a sharding engine."""
    return (
        f"model.load_in_4bit is true, but {engine} shards tensors, and 4-bit weights with their quantization "
        "constants cannot be sharded here: train on one GPU, or on several with train.engine=ddp."
    )
