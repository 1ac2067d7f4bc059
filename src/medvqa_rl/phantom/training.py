"""What the recipes of the embedded models share: tokenizer, training loop, learning curve and saved files."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from medvqa_rl.config import OptimizerConfig
from medvqa_rl.core.files import write_whole, writing
from medvqa_rl.learning.objective.optimizer import Optimizer, lr_at
from medvqa_rl.models.checkpoints import atomic_folder

Log = Callable[[dict[str, Any]], None]

LOG_STEPS = 50
"""Steps between log rows, and over which they average."""


def byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the special tokens are added to the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer


def cosine_schedule(learning_rate: float, *, warmup_steps: int, min_lr_ratio: float = 0.02) -> OptimizerConfig:
    """AdamW settings with a cosine schedule, as all recipes but binding use them."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        min_lr_ratio=min_lr_ratio,
        warmup_steps=warmup_steps,
        weight_decay=0.05,
        betas=(0.9, 0.98),
    )


def train(
    module: nn.Module,
    settings: OptimizerConfig,
    steps: int,
    backward: Callable[[int], Mapping[str, float]],
    log: Log,
    *,
    kept: Path | None = None,
    generator: torch.Generator | None = None,
    **labels: str,
) -> None:
    """Train a module with gradients clipped to a norm of 1.

    Args:
        module: everything that is trained.
        settings: optimizer and learning rate schedule.
        steps: number of optimizer steps.
        backward: called with the step; computes and backpropagates its loss and returns the values to log.
        log: called every :data:`LOG_STEPS` steps with the means of these values.
        kept: file that holds the state after every :data:`LOG_STEPS` steps; training continues from it if it exists.
        generator: what ``backward`` draws from, if it is not addressed by the step; its state is kept too.
        labels: included in each log row.
    """
    optimizer = Optimizer(module, settings)
    first = load_state(kept, optimizer, generator).get("steps", 0)
    recent, began = deque[Mapping[str, float]](maxlen=LOG_STEPS), time.perf_counter()
    for step in range(first, steps):
        recent.append(backward(step))
        clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step(lr_at(step, settings, steps))
        if (step + 1) % LOG_STEPS == 0:
            means = {name: sum(values[name] for values in recent) / len(recent) for name in recent[0]}
            seconds_left = (time.perf_counter() - began) / (step + 1 - first) * (steps - step - 1)
            log({**labels, "step": step + 1, "of": steps, **means, "minutes left": seconds_left / 60})
            save_state(kept, optimizer, generator, steps=step + 1)


def save_state(
    path: Path | None, optimizer: Optimizer, generator: torch.Generator | None = None, **numbers: int
) -> None:
    """Write trained weights, optimizer, generator and numbers, to continue from; without a path, write nothing."""
    if path is None:
        return
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in optimizer.parameters.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.state_tensors().items()}
    tensors |= {f"number/{name}": torch.tensor(number) for name, number in numbers.items()}
    if generator is not None:
        tensors["generator"] = generator.get_state()
    with write_whole(path) as temporary:
        save_file(tensors, temporary)


@torch.no_grad()
def load_state(path: Path | None, optimizer: Optimizer, generator: torch.Generator | None = None) -> dict[str, int]:
    """Load a state from :func:`save_state` and return its numbers; without a file, change nothing and return none."""
    if path is None or not path.is_file():
        return {}
    parts: dict[str, dict[str, Tensor]] = {"weight": {}, "optimizer": {}, "number": {}, "generator": {}}
    for name, tensor in load_file(path).items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = tensor
    for name, parameter in optimizer.parameters.items():
        parameter.copy_(parts["weight"][name])
    optimizer.load_state_tensors(parts["optimizer"])
    if generator is not None:
        generator.set_state(parts["generator"][""])
    return {name: int(tensor) for name, tensor in parts["number"].items()}


def curve_log(path: Path) -> Log:
    """A log function that adds the seconds since this call, prints each row, and appends it to a JSON Lines file."""
    began = time.perf_counter()

    def log(row: dict[str, Any]) -> None:
        row = row | {"seconds": round(time.perf_counter() - began, 1)}
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            "  ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )

    return log


def count_parameters(model: nn.Module) -> int:
    """Number of weights, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def refuse_existing(folder: Path) -> None:
    """
    Raises:
        ValueError: the folder exists.
    """
    if folder.exists():
        raise ValueError(f"The folder {folder} already exists: choose another with --output, or remove it.")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a model in bfloat16 with its tokenizer. Converts the model in place."""
    with atomic_folder(folder) as temporary:
        model.to(torch.bfloat16).eval().save_pretrained(temporary)  # type: ignore[arg-type]
        tokenizer.save_pretrained(temporary)
