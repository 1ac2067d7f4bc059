"""What can be wrong with settings that keep weights in 4 bits, said in complete sentences. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from medvqa_rl.config import Config


def quantized_problems(config: Config, *, trains: bool) -> Iterator[tuple[str, ...]]:
    """Everything that does not fit together: a sentence, then the dotted paths of the settings it is about.

    Args:
        trains: the settings are for training; a model in 4 bits can be evaluated without an adapter.
    """
    model, engine = config.model, config.train.engine
    if not model.load_in_4bit:
        return
    if trains and model.lora is None and model.adapter is None:
        yield (
            "model.load_in_4bit is true, but weights in 4 bits cannot be trained themselves: set model.lora, so that "
            "an adapter above them is trained, or model.load_in_4bit to false.",
            "model.load_in_4bit",
            "model.lora",
        )
    if trains and engine not in ("auto", "ddp"):
        yield (refuse_sharded(engine), "model.load_in_4bit", "train.engine")
    if config.rollout.engine == "graph":
        yield (
            "rollout.engine is graph, but CUDA graphs were not tested with weights in 4 bits (model.load_in_4bit is "
            "true): set rollout.engine to eager.",
            "model.load_in_4bit",
            "rollout.engine",
        )


def refuse_sharded(engine: str) -> str:
    """Why weights in 4 bits are not trained under an engine that shards, as a sentence."""
    return (
        f"model.load_in_4bit is true, but {engine} shards tensors, and weights in 4 bits with their constants cannot "
        "be sharded here: train on one GPU, or on several with train.engine=ddp."
    )
