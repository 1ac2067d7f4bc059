"""Problems with settings of 4-bit weights, as complete sentences. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from medvqa_rl.config import Config


def quantized_problems(config: Config, *, trains: bool) -> Iterator[tuple[str, ...]]:
    """Yield each problem: a sentence, then the dotted paths of the settings involved.

    Args:
        trains: the settings are for training; evaluation of a 4-bit model needs no adapter.
    """
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
